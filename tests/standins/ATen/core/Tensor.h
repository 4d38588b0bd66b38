// As much of torch as the walk's program needs, so that ThreadSanitizer sees the walk alone.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

namespace at {

enum ScalarType { kFloat };

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(int64_t size) : data_(std::make_shared<std::vector<float>>(size)) {}
  template <class T>
  T* mutable_data_ptr() const {
    return data_->data();
  }

 private:
  std::shared_ptr<std::vector<float>> data_;
};

using IntArrayRef = const std::vector<int64_t>&;

}  // namespace at
