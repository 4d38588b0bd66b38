#include "cpu/walk_arguments.h"

#include <algorithm>
#include <limits>
#include <string>

#include "cpu/walk.h"
#include "walk_network.h"

namespace blockdrop::walk {

int Network::segment_of(int block) const {
  int segment = 0;
  for (int end = layers[0]; segment < kSegments - 1 && block >= end;) end += layers[++segment];
  return segment;
}

Network read_network(const char* name, const at::Tensor& weights, at::IntArrayRef layers,
                     int64_t num_classes, bool subsample) {
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat, name,
                   ": expected dtype torch.float32, got ", weights.scalar_type());
  check_network(layers, num_classes);
  Network network;
  network.subsample = subsample;
  network.num_blocks = 0;
  network.num_classes = static_cast<int>(num_classes);
  network.padded_classes = static_cast<int>(round_up(num_classes, kClassMultiple));

  const float* data = weights.const_data_ptr<float>();
  int64_t offset = 0;
  auto take_conv = [&](int64_t in_channels, int64_t out_channels) {
    const int64_t begin = offset;
    const int64_t values = 9 + (in_channels == out_channels ? kTileProducts : 0);
    offset += out_channels * (1 + values * in_channels);
    return offset <= weights.numel() ? data + begin : nullptr;
  };
  network.stem = take_conv(kImageChannels, kWidths[0]);
  int channels = kWidths[0];
  for (int segment = 0; segment < kSegments; ++segment) {
    network.layers[segment] = static_cast<int>(layers[segment]);
    network.num_blocks += network.layers[segment];
    for (int block = 0; block < network.layers[segment]; ++block) {
      network.convs.push_back(take_conv(channels, kWidths[segment]));
      channels = kWidths[segment];
      network.convs.push_back(take_conv(channels, channels));
    }
  }
  network.classifier = data + std::min(offset, weights.numel());
  offset += (1 + channels) * static_cast<int64_t>(network.padded_classes);
  check_length(name, weights, ++offset, "packed values");
  check_signature(name, weights, {{num_classes, subsample}, layers});
  return network;
}

void check_signature(const char* name, const at::Tensor& weights,
                     std::initializer_list<at::IntArrayRef> description) {
  constexpr int64_t kSignatures = 16777213;
  int64_t value = 0;
  for (const at::IntArrayRef numbers : description) {
    for (const int64_t one : numbers) value = (value * 1000003 + one) % kSignatures;
  }
  TORCH_CHECK_VALUE(
      weights.const_data_ptr<float>()[weights.numel() - 1] == static_cast<float>(value), name,
      ": packed for another network than the arguments say");
}

Images read_images(const at::Tensor& images, int64_t multiple) {
  TORCH_CHECK_TYPE(images.scalar_type() == at::kFloat, "images: expected dtype torch.float32, got ",
                   images.scalar_type());
  check_images(images);
  const int64_t height = images.size(2), width = images.size(3);
  TORCH_CHECK_VALUE(height > 0 && width > 0 && height % multiple == 0 && width % multiple == 0,
                    "images: height and width must be positive",
                    multiple > 1 ? " multiples of " + std::to_string(multiple) : "", ", got ",
                    height, "x", width);
  constexpr int64_t kMostPixels = std::numeric_limits<int>::max() / kWidths[kSegments - 1];
  TORCH_CHECK_VALUE(
      height <= kMostPixels && width <= kMostPixels && (height + 2) * (width + 2) <= kMostPixels,
      "images: too large for this kernel, got ", height, "x", width);
  TORCH_CHECK_VALUE(images.size(0) <= std::numeric_limits<int>::max(),
                    "images: too many for this kernel, got ", images.size(0));
  return {images.const_data_ptr<float>(),
          static_cast<int>(images.size(0)),
          static_cast<int>(height),
          static_cast<int>(width),
          images.stride(0),
          images.stride(1),
          images.stride(2),
          images.stride(3)};
}

}  // namespace blockdrop::walk
