#include "session.h"

#include <algorithm>
#include <stdexcept>

namespace rotquant {
namespace {

namespace ffi = tvm::ffi;

constexpr int kPooledAllocator = 2;  // of TVM's virtual machine
constexpr size_t kChunk = 512;       // tokens that one call of prefill takes

ffi::Function Required(const ffi::Module& module, const char* name) {
  ffi::Optional<ffi::Function> found = module->GetFunction(name, false);
  if (!found.has_value()) throw std::runtime_error(std::string("the library has no function ") + name);
  return found.value();
}

// A virtual machine over the library; its shape functions always run on the CPU.
ffi::Module StartMachine(const ffi::Module& library, DLDevice device) {
  ffi::Module machine = Required(library, "vm_load_executable")().cast<ffi::Module>();
  ffi::Function start = Required(machine, "vm_initialization");
  int type = device.device_type;
  if (type == kDLCPU) {
    start(type, 0, kPooledAllocator);
  } else {
    start(type, static_cast<int>(device.device_id), kPooledAllocator, static_cast<int>(kDLCPU), 0, kPooledAllocator);
  }
  return machine;
}

size_t Bytes(const ffi::Tensor& tensor) {
  size_t count = 1;
  for (int64_t size : tensor.shape()) count *= static_cast<size_t>(size);
  return count * tensor.dtype().bits / 8;
}

}  // namespace

Session::Session(const Artifact& artifact, int64_t capacity)
    : device_(artifact.device),
      capacity_(capacity),
      vocab_size_(artifact.vocab_size),
      library_(LoadLibrary(artifact)),
      machine_(StartMachine(library_, artifact.device)),
      prefill_(Required(machine_, "prefill")),
      decode_(Required(machine_, "decode")),
      weights_(LoadWeights(artifact)) {
  ffi::Any arrays = Required(machine_, "create_kv_cache")(int64_t{1}, capacity);
  for (const ffi::Any& array : arrays.cast<ffi::Array<ffi::Any>>()) {
    cache_.push_back(array.cast<ffi::Tensor>());
    cache_bytes_ += Bytes(cache_.back());
  }
}

std::vector<float> Session::Prefill(const std::vector<int32_t>& ids) {
  if (ids.empty()) throw std::runtime_error("prefill was given no token");
  for (int32_t id : ids) CheckToken(id);
  CheckRoom(static_cast<int64_t>(ids.size()));
  std::vector<float> logits;
  for (size_t begin = 0; begin < ids.size(); begin += kChunk) {
    std::vector<int32_t> chunk(ids.begin() + begin, ids.begin() + std::min(ids.size(), begin + kChunk));
    int64_t count = static_cast<int64_t>(chunk.size());
    logits = Call(prefill_, {Place(chunk, {1, count}), Place({static_cast<int32_t>(count)}, {1})});
    length_ += count;
  }
  return logits;
}

std::vector<float> Session::Decode(int32_t id) {
  CheckToken(id);
  CheckRoom(1);
  std::vector<float> logits = Call(decode_, {Place({id}, {1, 1})});
  ++length_;
  return logits;
}

ffi::Tensor Session::Place(const std::vector<int32_t>& values, const std::vector<int64_t>& shape) const {
  ffi::Tensor tensor = Allocate(shape, DLDataType{kDLInt, 32, 1}, device_);
  CopyFromHost(tensor, values.data(), values.size() * sizeof(int32_t));
  return tensor;
}

std::vector<float> Session::Call(const ffi::Function& function, const std::vector<ffi::Tensor>& inputs) {
  std::vector<ffi::AnyView> arguments(inputs.begin(), inputs.end());
  arguments.insert(arguments.end(), cache_.begin(), cache_.end());
  arguments.insert(arguments.end(), weights_.begin(), weights_.end());
  ffi::Any result;
  function.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
  ffi::Tensor logits = result.cast<ffi::Tensor>();
  std::vector<float> values(Bytes(logits) / sizeof(float));
  static const ffi::Function copy = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
  copy(logits, static_cast<void*>(values.data()), values.size() * sizeof(float));
  return values;
}

void Session::CheckToken(int32_t id) const {
  if (id < 0 || id >= vocab_size_) {
    throw std::runtime_error("token id " + std::to_string(id) + " is outside the vocabulary (0 to " +
                             std::to_string(vocab_size_ - 1) + ")");
  }
}

void Session::CheckRoom(int64_t more) const {
  if (length_ + more > capacity_) {
    throw std::runtime_error("the KV cache holds " + std::to_string(capacity_) + " tokens and " +
                             std::to_string(length_ + more) + " are needed; use a larger --capacity");
  }
}

}  // namespace rotquant
