// Slots of one matrix follow each other: groups of them.
#pragma once

#include <vector>

namespace moebius {

struct Group {
  int begin, end;  // slots of one matrix
};

template <typename Slots>
std::vector<Group> groups_of(const Slots& slots) {
  std::vector<Group> groups;
  for (int i = 0; i < static_cast<int>(slots.size()); ++i) {
    if (i == 0 || slots[i].matrix != slots[i - 1].matrix) groups.push_back({i, i});
    groups.back().end = i + 1;
  }
  return groups;
}

}  // namespace moebius
