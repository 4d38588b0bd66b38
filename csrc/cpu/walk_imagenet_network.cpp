#include "cpu/walk_imagenet_network.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "cpu/walk_arguments.h"
#include "walk_network.h"

namespace blockdrop::walk_imagenet {
namespace {

constexpr int kStemChannels = 64;
constexpr int64_t kMostChannels = int64_t{1} << 20;

int panels(int64_t channels) { return static_cast<int>((channels + kPanel - 1) / kPanel); }

// Takes layers off a vector of packed weights, in order.
class Reader {
 public:
  explicit Reader(const at::Tensor& weights)
      : data_(weights.const_data_ptr<float>()), length_(weights.numel()) {}

  PackedConv take(int in_panels, int out_panels, int kernel, int stride, bool winograd) {
    const int64_t values = winograd ? kTileProducts : kernel * kernel;
    return take(int64_t{kPanel} * in_panels * values,
                {nullptr, in_panels, out_panels, kernel, stride, winograd});
  }

  PackedConv take_stem() {
    return take(kStemKernel * kStemKernel * kImageChannels,
                {nullptr, 1, panels(kStemChannels), kStemKernel, 2, false});
  }

  int64_t taken() const { return taken_; }

 private:
  PackedConv take(int64_t inputs, PackedConv conv) {
    conv.weights = data_ + std::min(taken_, length_);
    taken_ += (inputs + 1) * conv.out_panels * kPanel;
    return conv;
  }

  const float* const data_;
  const int64_t length_;
  int64_t taken_ = 0;
};

void check(const Description& of) {
  const auto check_list = [&](const char* name, at::IntArrayRef list, size_t length,
                              const char* each, int64_t most) {
    TORCH_CHECK_VALUE(
        list.size() == length &&
            std::all_of(list.begin(), list.end(), [&](int64_t n) { return n >= 1 && n <= most; }),
        name, ": expected a positive number for each of ", length, each, ", got ", list);
  };
  TORCH_CHECK_VALUE(!of.layers.empty(), "layers: expected at least one segment, got none");
  // No more than there are weights, or than any network has, so that they can be counted.
  const size_t segments = of.layers.size();
  check_list("layers", of.layers, segments, " segments", of.weights.numel());
  check_list("channels", of.channels, segments, " segments", kMostChannels);
  const auto blocks = std::accumulate(of.layers.begin(), of.layers.end(), size_t{0});
  check_list("widths", of.widths, blocks, " blocks", kMostChannels);
  TORCH_CHECK_VALUE(
      of.num_classes >= 1 && of.num_classes <= std::numeric_limits<int>::max() - kPanel,
      "num_classes: expected at least 1, got ", of.num_classes);
  TORCH_CHECK_VALUE(of.winograd >= 0, "winograd: expected at least 0 segments, got ", of.winograd);
}

}  // namespace

Network read_network(const char* name, const Description& of) {
  TORCH_CHECK_TYPE(of.weights.scalar_type() == at::kFloat, name,
                   ": expected dtype torch.float32, got ", of.weights.scalar_type());
  check(of);
  Network network;
  network.num_segments = static_cast<int>(of.layers.size());
  network.num_blocks = 0;
  network.num_classes = static_cast<int>(of.num_classes);
  Reader reader(of.weights);
  network.stem = reader.take_stem();
  int in = panels(kStemChannels);
  int64_t in_channels = kStemChannels;
  for (int segment = 0; segment < network.num_segments; ++segment) {
    const int out = panels(of.channels[segment]);
    const bool winograd = segment < of.winograd;
    for (int64_t index = 0; index < of.layers[segment]; ++index) {
      const int width = panels(of.widths[network.num_blocks]);
      const int stride = segment > 0 && index == 0 ? 2 : 1;
      const bool projects = stride == 2 || in_channels != of.channels[segment];
      Block block{segment, {}, {}};
      if (of.bottleneck) block.convs.push_back(reader.take(in, width, 1, 1, false));
      block.convs.push_back(
          reader.take(of.bottleneck ? width : in, width, 3, stride, winograd && stride == 1));
      if (projects) block.projection = reader.take(in, out, 1, stride, false);
      block.convs.push_back(of.bottleneck ? reader.take(width, out, 1, 1, false)
                                          : reader.take(width, out, 3, 1, winograd));
      network.blocks.push_back(std::move(block));
      ++network.num_blocks;
      in = out;
      in_channels = of.channels[segment];
      if (reader.taken() > of.weights.numel()) break;
    }
  }
  network.classifier = reader.take(in, panels(of.num_classes), 1, 1, false);
  check_length(name, of.weights, reader.taken() + 1, "packed values");
  const int64_t winograd = std::min(of.winograd, static_cast<int64_t>(of.layers.size()));
  walk::check_signature(
      name, of.weights,
      {{of.bottleneck, of.num_classes, winograd}, of.layers, of.channels, of.widths});
  return network;
}

}  // namespace blockdrop::walk_imagenet
