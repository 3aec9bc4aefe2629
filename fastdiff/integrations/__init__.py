"""What brings the fused ops into other libraries' models. Nothing here imports those libraries: a
module of theirs can only exist where they are imported already."""
