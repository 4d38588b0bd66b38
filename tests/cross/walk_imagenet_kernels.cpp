// Runs the kernels of the walk of ImageNet networks against plain loops in double precision: a
// program of its own, for processors that torch is not at hand for. Exit status 0: they agree.

#include "cpu/walk_imagenet_kernels.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

using namespace blockdrop::walk_imagenet;
using Floats = std::vector<float>;

namespace {

constexpr double kTolerance = 2e-6;  // of the largest value
int failures = 0;

Floats random_floats(Index count) {
  static std::mt19937 generator(0);
  std::uniform_real_distribution<float> uniform(-1, 1);
  Floats values(count);
  for (float& value : values) value = uniform(generator);
  return values;
}

void check(const char* name, const Floats& values, const std::vector<double>& expected) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double difference = std::abs(values[i] - expected[i]);
    error = difference <= error ? error : difference;  // NaN stays
    largest = std::max(largest, std::abs(expected[i]));
  }
  const bool agrees = error <= kTolerance * largest;
  std::printf("%s: error %.1e, largest %.1e%s\n", name, error, largest, agrees ? "" : ": WRONG");
  failures += !agrees;
}

// Weights [out, kernel, kernel, in] as the kernels read them; see ops/walk_imagenet.py.
Floats pack(const Floats& plain, const Floats& bias, int in, int out, int kernel, bool winograd) {
  Floats packed = bias;
  const auto at = [&](int o, int ky, int kx, int i) {
    return static_cast<double>(plain[((Index{o} * kernel + ky) * kernel + kx) * in + i]);
  };
  if (winograd) {
    const double transform[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
    for (int panel = 0; panel < out; panel += kPanel)
      for (int product = 0; product < kTileProducts; ++product)
        for (int i = 0; i < in; ++i)
          for (int o = panel; o < panel + kPanel; ++o) {
            double sum = 0;
            for (int y = 0; y < 3; ++y)
              for (int x = 0; x < 3; ++x)
                sum += transform[product / 4][y] * at(o, y, x, i) * transform[product % 4][x];
            packed.push_back(static_cast<float>(sum));
          }
    return packed;
  }
  for (int out_block = 0; out_block < out; out_block += kBlockOut)
    for (int tap = 0; tap < kernel * kernel; ++tap)
      for (int in_block = 0; in_block < in; in_block += kBlockIn)
        for (int panel = out_block; panel < min(out, out_block + kBlockOut); panel += kPanel)
          for (int i = in_block; i < min(in, in_block + kBlockIn); ++i)
            for (int o = panel; o < panel + kPanel; ++o)
              packed.push_back(static_cast<float>(at(o, tap / kernel, tap % kernel, i)));
  return packed;
}

void check_conv(const char* name, int in, int out, int height, int width, int kernel, int stride,
                bool winograd, bool has_residual) {
  const Kernels kernels = make_kernels("");
  const int out_height = (height - 1) / stride + 1, out_width = (width - 1) / stride + 1;
  const Index pixels = Index{height} * width, out_pixels = Index{out_height} * out_width;
  const Floats input = random_floats(in * pixels), bias = random_floats(out);
  const Floats plain = random_floats(Index{out} * kernel * kernel * in);
  const Floats weights = pack(plain, bias, in, out, kernel, winograd);
  Floats output = random_floats(out * out_pixels), scratch(1 << 21, NAN);

  std::vector<double> expected(output.size());
  for (int o = 0; o < out; ++o)
    for (int y = 0; y < out_height; ++y)
      for (int x = 0; x < out_width; ++x) {
        const Index at = (o / kPanel * out_pixels + y * out_width + x) * kPanel + o % kPanel;
        double sum = bias[o] + (has_residual ? output[at] : 0.);
        for (int ky = 0; ky < kernel; ++ky)
          for (int kx = 0; kx < kernel; ++kx) {
            const int from_y = y * stride + ky - kernel / 2, from_x = x * stride + kx - kernel / 2;
            if (from_y < 0 || from_y >= height || from_x < 0 || from_x >= width) continue;
            for (int i = 0; i < in; ++i)
              sum += static_cast<double>(
                         input[(i / kPanel * pixels + from_y * width + from_x) * kPanel +
                               i % kPanel]) *
                     plain[((Index{o} * kernel + ky) * kernel + kx) * in + i];
          }
        expected[at] = std::max(sum, 0.);
      }

  const Conv conv{input.data(),
                  weights.data(),
                  has_residual ? output.data() : nullptr,
                  output.data(),
                  in / kPanel,
                  out / kPanel,
                  1,
                  height,
                  width,
                  out_height,
                  out_width,
                  kernel,
                  stride,
                  true};
  const auto run = winograd                     ? kernels.winograd
                   : kernel == 1 && stride == 1 ? kernels.pointwise
                                                : kernels.direct;
  const int rows = winograd ? num_tiles(height, width) : static_cast<int>(out_pixels);
  const int panels = out / kPanel;
  for (const auto& [row_begin, row_end] : {std::pair{0, rows / 3}, {rows / 3, rows}})
    for (const auto& [begin, end] : {std::pair{0, panels / 2}, {panels / 2, panels}})
      run(conv, Part{row_begin, row_end, begin, end, scratch.data(), {weights.data(), 4096}});
  check(name, output, expected);
}

void check_mean() {
  const Floats input = random_floats(2 * 9 * kPanel);
  Floats output(2 * kPanel);
  std::vector<double> expected(2 * kPanel);
  for (size_t i = 0; i < input.size(); ++i)
    expected[i / (9 * kPanel) * kPanel + i % kPanel] += input[i] / 9.;
  make_kernels("").mean({input.data(), output.data(), 2, 1, 9}, Part{0, 0, 0, 2, nullptr});
  check("mean", output, expected);
}

void check_stem(int height, int width) {
  constexpr int kOut = 64, kTaps = kStemKernel * kStemKernel * kImageChannels;
  const int conv_height = (height + 1) / 2, conv_width = (width + 1) / 2;
  const int out_height = (conv_height + 1) / 2, out_width = (conv_width + 1) / 2;
  const int row = (width + 2 * kStemBorder) * kImageChannels;
  Floats input(Index{height + 2 * kStemBorder} * row, 0.f);
  for (int y = 0; y < height; ++y) {
    const Floats pixels = random_floats(Index{width} * kImageChannels);
    std::copy(pixels.begin(), pixels.end(),
              input.begin() + (y + kStemBorder) * row + kStemBorder * kImageChannels);
  }
  const Floats weights = random_floats(kOut * (1 + kTaps));
  Floats output(Index{kOut} * out_height * out_width, NAN);
  Floats scratch(stem_scratch(conv_width, kOut / kPanel), NAN);

  std::vector<double> expected(output.size());  // of what is pooled nothing is negative
  for (int o = 0; o < kOut; ++o)
    for (int y = 0; y < conv_height; ++y)
      for (int x = 0; x < conv_width; ++x) {
        double sum = weights[o];
        for (int tap = 0; tap < kTaps; ++tap) {
          const int ky = tap / (kStemKernel * kImageChannels);
          const int rest = tap % (kStemKernel * kImageChannels);
          sum += static_cast<double>(
                     weights[kOut + (o / kPanel * Index{kTaps} + tap) * kPanel + o % kPanel]) *
                 input[(2 * y + ky) * row + 2 * x * kImageChannels + rest];
        }
        for (int py = y / 2; py <= min((y + 1) / 2, out_height - 1); ++py)
          for (int px = x / 2; px <= min((x + 1) / 2, out_width - 1); ++px) {
            double& most =
                expected[((o / kPanel * out_height + py) * out_width + px) * kPanel + o % kPanel];
            most = std::max(most, sum);
          }
      }

  const Stem stem{input.data(), weights.data(), output.data(), kOut / kPanel, 1,        height,
                  width,        conv_height,    conv_width,    out_height,    out_width};
  for (const auto& [begin, end] : {std::pair{0, out_height / 2}, {out_height / 2, out_height}})
    make_kernels("").stem(stem, Part{begin, end, 0, kOut / kPanel, scratch.data()});
  check("stem", output, expected);
}

}  // namespace

int main() {
  std::printf("%d floats a vector, %d rows at once\n", blockdrop::kLanes, kMaxRows);
  check_conv("1x1", 288, 544, 5, 7, 1, 1, false, true);
  check_conv("1x1, stride 2", 64, 96, 7, 4, 1, 2, false, false);
  check_conv("3x3", 64, 64, 6, 5, 3, 1, false, true);
  check_conv("3x3, stride 2", 64, 96, 9, 6, 3, 2, false, false);
  check_conv("Winograd", 64, 96, 16, 16, 3, 1, true, false);
  check_conv("Winograd, odd, residual", 320, 64, 7, 9, 3, 1, true, true);
  check_stem(21, 30);
  check_mean();
  return failures != 0;
}
