// An artifact folder as tvmc compile writes it: manifest.json, model.so and weights.safetensors.
#ifndef ROTQUANT_DEPLOY_ARTIFACT_H_
#define ROTQUANT_DEPLOY_ARTIFACT_H_

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace rotquant {

// What a program needs of an artifact. Every function below throws std::runtime_error with a line that says what is
// wrong with which file.
struct Artifact {
  std::string folder;
  DLDevice device;                             // the kind that the library was compiled for, number 0
  std::set<int64_t> eos_tokens;                // each ends a generation
  int64_t default_capacity;                    // tokens per sequence
  int64_t vocab_size;                          // ids of tokens are below
  std::vector<std::string> weight_names;       // in the order in which the library takes them
};

// Read manifest.json.
Artifact ReadArtifact(const std::string& folder);

// Load model.so; for CUDA also the part of TVM's runtime that talks to the driver.
tvm::ffi::Module LoadLibrary(const Artifact& artifact);

// Copy the weights from weights.safetensors to the artifact's device, one at a time.
std::vector<tvm::ffi::Tensor> LoadWeights(const Artifact& artifact);

// An uninitialized tensor on a device.
tvm::ffi::Tensor Allocate(const std::vector<int64_t>& shape, DLDataType dtype, DLDevice device);

// Copy nbytes from the host into a tensor of exactly this size.
void CopyFromHost(const tvm::ffi::Tensor& tensor, const void* data, size_t nbytes);

}  // namespace rotquant

#endif  // ROTQUANT_DEPLOY_ARTIFACT_H_
