#include "cpu/walk_paths.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

namespace blockdrop::walk {

std::vector<Path> order_paths(const bool* decisions,  // [num_sets, batch, num_blocks]
                              int num_sets, int batch, int num_blocks) {
  std::vector<Path> paths(static_cast<size_t>(num_sets) * batch);
  for (int image = 0; image < batch; ++image) {
    Path* own = paths.data() + static_cast<size_t>(image) * num_sets;
    for (int set = 0; set < num_sets; ++set) {
      const size_t row = static_cast<size_t>(set) * batch + image;
      own[set] = {decisions + row * num_blocks, set, 0, 0};
    }
    std::sort(own, own + num_sets, [&](const Path& a, const Path& b) {
      const int order = std::memcmp(a.keep, b.keep, num_blocks);
      return order != 0 ? order > 0 : a.set < b.set;
    });
    for (int i = 1; i < num_sets; ++i) {
      const bool* keep = own[i].keep;
      own[i].fork =
          static_cast<int>(std::mismatch(keep, keep + num_blocks, own[i - 1].keep).first - keep);
      own[i].source = i - 1;
      while (own[own[i].source].fork > own[i].fork) --own[i].source;
    }
  }
  return paths;
}

std::vector<int> order_images(const std::vector<Path>& paths, int num_sets, int batch,
                              int num_blocks) {
  std::vector<int64_t> cost(batch, 0);
  for (int image = 0; image < batch; ++image) {
    for (int i = 0; i < num_sets; ++i) {
      const Path& path = paths[static_cast<size_t>(image) * num_sets + i];
      cost[image] += std::count(path.keep + path.fork, path.keep + num_blocks, true);
    }
  }
  std::vector<int> order(batch);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost[a] > cost[b]; });
  return order;
}

}  // namespace blockdrop::walk
