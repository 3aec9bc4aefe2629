// TestU01's batteries on the words of fastdiff's noise: a line a p-value, name and value.
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
#include <testu01/bbattery.h>
#include <testu01/swrite.h>
#include <testu01/unif01.h>
}

#include "feeds.h"

namespace {

Feed* feed;
bool reversed;
uint32_t words[kWords];
int at = kWords;
uint64_t used = 0;

// TestU01 looks at the upper bits of a word far more than at the lower ones.
uint32_t reverse(uint32_t w) {
  w = (w >> 1 & 0x55555555u) | (w & 0x55555555u) << 1;
  w = (w >> 2 & 0x33333333u) | (w & 0x33333333u) << 2;
  w = (w >> 4 & 0x0F0F0F0Fu) | (w & 0x0F0F0F0Fu) << 4;
  return __builtin_bswap32(w);
}

unsigned int next() {
  if (at == kWords) {
    feed->next(words);
    at = 0;
  }
  ++used;
  const uint32_t word = words[at++];
  return reversed ? reverse(word) : word;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  Feed source(argv[1], std::strtoull(argv[2], nullptr, 10), std::atoi(argv[3]));
  reversed = !std::strcmp(argv[4], "low");
  feed = &source;
  const char* battery = argv[5];
  swrite_Basic = FALSE;
  char name[] = "fastdiff";
  unif01_Gen* gen = unif01_CreateExternGenBits(name, next);
  std::freopen("/dev/null", "w", stdout);  // the report; the p-values go to stderr
  const double bits = 4294967296.0;        // of Rabbit and Alphabit
  if (!std::strcmp(battery, "SmallCrush"))
    bbattery_SmallCrush(gen);
  else if (!std::strcmp(battery, "Crush"))
    bbattery_Crush(gen);
  else if (!std::strcmp(battery, "BigCrush"))
    bbattery_BigCrush(gen);
  else if (!std::strcmp(battery, "Rabbit"))
    bbattery_Rabbit(gen, bits);
  else if (!std::strcmp(battery, "Alphabit"))
    bbattery_Alphabit(gen, bits, 0, 32);
  else
    return 2;
  for (int i = 0; i < bbattery_NTests; ++i)
    std::fprintf(stderr, "%s\t%.17g\n", bbattery_TestNames[i], bbattery_pVal[i]);
  std::fprintf(stderr, "words\t%llu\n", static_cast<unsigned long long>(used));
}
