"""``fastdiff demo``: one picture a topic."""
import argparse
def add_arguments(s: argparse.ArgumentParser) -> None: pass
