// battery FEED SEED ROUNDS LOG2_BYTES: statistics of so many bytes, a line each.
// battery FEED SEED ROUNDS 0: the bytes themselves, without end, for another battery.
#include <cstdlib>
#include <memory>

#include "feeds.h"
#include "tests.h"

static int usage() {
  std::fprintf(stderr, "usage: battery FEED SEED ROUNDS(1-10) LOG2_BYTES(0 or 20-)\n");
  return 2;
}

int main(int argc, char** argv) {
  if (argc != 5) return usage();
  const int rounds = std::atoi(argv[3]), log2_bytes = std::atoi(argv[4]);
  Feed feed(argv[1], std::strtoull(argv[2], nullptr, 10), rounds);
  if (feed.order == kUnknown || rounds < 1 || rounds > 10 || (log2_bytes && log2_bytes < 20))
    return usage();
  std::vector<uint32_t> words(kBuffer);
  if (!log2_bytes) {
    do feed.next(words.data());
    while (std::fwrite(words.data(), 4, kWords, stdout) == kWords);
    return 0;
  }

  Bits bits;
  Halves low(0), high(16);
  std::vector<Pairs> pairs;
  for (int lag : {1, 2, 4, 16, 64, 256, 1024})
    for (int shift : {0, 24}) pairs.emplace_back(lag, shift);
  std::vector<Weights> weights;
  for (int stride : {1, 4, 64, 1024}) weights.emplace_back(stride);
  Correlations correlations;
  Birthdays birthdays(log2_bytes);
  Ranks<256> small(log2_bytes, 65536);
  auto large = std::make_unique<Ranks<1024>>(log2_bytes, 4096);
  Tails tails;

  for (uint64_t done = 0; done < uint64_t{1} << (log2_bytes - 2); done += kBuffer) {
    for (int at = 0; at < kBuffer; at += kWords) {
      feed.next(&words[at]);
      if (feed.of_normals) tails.add(feed.normals(), kWords);
    }
    const uint32_t* w = words.data();
    bits.add(w), low.add(w), high.add(w), correlations.add(w), birthdays.add(w);
    small.add(w), large->add(w);
    for (auto& test : pairs) test.add(w);
    for (auto& test : weights) test.add(w);
  }

  bits.print(), low.print(), high.print(), correlations.print(), birthdays.print();
  small.print(), large->print();
  for (auto& test : pairs) test.print();
  for (auto& test : weights) test.print();
  if (feed.of_normals) tails.print();
}
