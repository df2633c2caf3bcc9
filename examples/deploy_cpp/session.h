// One sequence that grows in a packed KV cache.
#ifndef ROTQUANT_DEPLOY_SESSION_H_
#define ROTQUANT_DEPLOY_SESSION_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <string>
#include <vector>

#include "artifact.h"

namespace rotquant {

// A batch of one over a compiled library. The library's functions (see docs in ARCHITECTURE.md, "Sessions"):
//   create_kv_cache(batch, capacity) -> tensors, which the caller owns and the functions below update in place
//   prefill(ids int32 [b, s], new_lengths int32 [b], *cache, *weights) -> logits float32 [b, vocab]
//   decode(ids int32 [b, 1], *cache, *weights) -> logits float32 [b, vocab]
class Session {
 public:
  // capacity: the most tokens that the sequence may hold. Throws std::runtime_error.
  Session(const Artifact& artifact, int64_t capacity);

  // Append tokens, in chunks; returns the logits after the last. Throws if they are none or do not fit.
  std::vector<float> Prefill(const std::vector<int32_t>& ids);

  // Append one token and return the logits after it.
  std::vector<float> Decode(int32_t id);

  int64_t length() const { return length_; }
  size_t cache_bytes() const { return cache_bytes_; }

 private:
  tvm::ffi::Tensor Place(const std::vector<int32_t>& values, const std::vector<int64_t>& shape) const;
  std::vector<float> Call(const tvm::ffi::Function& function, const std::vector<tvm::ffi::Tensor>& inputs);
  void CheckToken(int32_t id) const;
  void CheckRoom(int64_t more) const;

  DLDevice device_;
  int64_t capacity_, vocab_size_;
  int64_t length_ = 0;
  size_t cache_bytes_ = 0;
  tvm::ffi::Module library_, machine_;
  tvm::ffi::Function prefill_, decode_;
  std::vector<tvm::ffi::Tensor> cache_, weights_;
};

}  // namespace rotquant

#endif  // ROTQUANT_DEPLOY_SESSION_H_
