#include "artifact.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>

namespace rotquant {
namespace {

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

constexpr int64_t kManifestVersion = 2;

std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

json::Object ParseObject(const std::string& text, const std::string& where) {
  ffi::String problem;
  json::Value value = json::Parse(ffi::String(text), &problem);
  std::optional<json::Object> object = value.as<json::Object>();
  if (!object) throw std::runtime_error(where + " is no JSON object " + std::string(problem));
  return *object;
}

// The entry of an object, as the C++ type T.
template <typename T>
T Entry(const json::Object& object, const char* key, const std::string& where) {
  auto found = object.find(ffi::String(key));
  if (found != object.end()) {
    if (std::optional<T> value = (*found).second.template as<T>()) return *value;
  }
  throw std::runtime_error(where + ": no usable entry '" + key + "'");
}

// Linux's names of the instruction sets that this CPU has; empty where they cannot be told.
std::set<std::string> CpuFeatures() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    return {std::istream_iterator<std::string>(words), std::istream_iterator<std::string>()};
  }
  return {};
}

// Code for instructions that the CPU lacks would end the program without a word.
void CheckCpu(const json::Object& manifest, const std::string& where) {
  auto requires_entry = manifest.find(ffi::String("requires"));
  if (requires_entry == manifest.end() || !(*requires_entry).second.as<json::Object>()) return;
  json::Object cpu = Entry<json::Object>(Entry<json::Object>(manifest, "requires", where), "cpu", where);
  std::set<std::string> present = CpuFeatures();
  for (const ffi::Any& name : Entry<json::Array>(cpu, "features", where)) {
    std::string feature(name.cast<ffi::String>());
    if (!present.empty() && !present.count(feature)) {
      throw std::runtime_error(where + ": compiled for a CPU with " + feature + ", which this one lacks");
    }
  }
}

// The kind in "llvm", "llvm -mcpu=…" or {"kind":"cuda", …}.
DLDevice DeviceOf(const std::string& target, const std::string& where) {
  std::string kind = target.substr(0, target.find(' '));
  if (!target.empty() && target[0] == '{') {
    kind = std::string(Entry<ffi::String>(ParseObject(target, where), "kind", where + ": target"));
  }
  if (kind == "llvm") return DLDevice{kDLCPU, 0};
  if (kind == "cuda") return DLDevice{kDLCUDA, 0};
  throw std::runtime_error(where + ": compiled for '" + kind + "', which this program does not run");
}

DLDataType TypeOf(const std::string& name) {
  static const std::map<std::string, DLDataType> known = {
      {"F64", {kDLFloat, 64, 1}}, {"F32", {kDLFloat, 32, 1}}, {"F16", {kDLFloat, 16, 1}}, {"BF16", {kDLBfloat, 16, 1}},
      {"I64", {kDLInt, 64, 1}},   {"I32", {kDLInt, 32, 1}},   {"I16", {kDLInt, 16, 1}},   {"I8", {kDLInt, 8, 1}},
      {"U64", {kDLUInt, 64, 1}},  {"U32", {kDLUInt, 32, 1}},  {"U16", {kDLUInt, 16, 1}},  {"U8", {kDLUInt, 8, 1}},
  };
  auto found = known.find(name);
  if (found == known.end()) throw std::runtime_error("weights of type " + name + " are not known");
  return found->second;
}

// A file in memory, read only.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    int file = open(path.c_str(), O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) {
      if (file >= 0) close(file);
      throw std::runtime_error(path + " cannot be read");
    }
    size_ = static_cast<size_t>(status.st_size);
    void* place = size_ ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    close(file);
    if (place == MAP_FAILED) throw std::runtime_error(path + " cannot be mapped");
    data_ = static_cast<const char*>(place);
  }
  ~MappedFile() { munmap(const_cast<char*>(data_), size_); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const char* data_;
  size_t size_;
};

}  // namespace

ffi::Tensor Allocate(const std::vector<int64_t>& shape, DLDataType dtype, DLDevice device) {
  static const ffi::Function allocate = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  return allocate(ffi::Shape(shape), dtype, device, ffi::Optional<ffi::String>()).cast<ffi::Tensor>();
}

void CopyFromHost(const ffi::Tensor& tensor, const void* data, size_t nbytes) {
  static const ffi::Function copy = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes");
  copy(tensor, const_cast<void*>(data), nbytes);
}

Artifact ReadArtifact(const std::string& folder) {
  std::string where = folder + "/manifest.json";
  json::Object manifest = ParseObject(ReadText(where), where);
  if (Entry<int64_t>(manifest, "version", where) != kManifestVersion) {
    throw std::runtime_error(where + " is of another version; compile the model again");
  }
  CheckCpu(manifest, where);
  Artifact artifact;
  artifact.folder = folder;
  artifact.device = DeviceOf(std::string(Entry<ffi::String>(manifest, "target", where)), where);
  artifact.default_capacity = Entry<int64_t>(manifest, "default_capacity", where);
  json::Object tokenizer = Entry<json::Object>(manifest, "tokenizer", where);
  for (const ffi::Any& token : Entry<json::Array>(tokenizer, "eos_token_ids", where)) {
    artifact.eos_tokens.insert(token.cast<int64_t>());
  }
  json::Object info = Entry<json::Object>(manifest, "kv_cache_info", where);
  artifact.vocab_size = Entry<int64_t>(info, "vocab_size", where);
  for (const ffi::Any& name : Entry<json::Array>(info, "weights", where)) {
    artifact.weight_names.emplace_back(std::string(name.cast<ffi::String>()));
  }
  return artifact;
}

ffi::Module LoadLibrary(const Artifact& artifact) {
  if (artifact.device.device_type == kDLCUDA && !dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL)) {
    throw std::runtime_error(std::string("TVM's CUDA runtime cannot be loaded: ") + dlerror());
  }
  return ffi::Module::LoadFromFile(artifact.folder + "/model.so");
}

// The format: the header's length in eight bytes, a JSON header, the data (https://github.com/huggingface/safetensors).
std::vector<ffi::Tensor> LoadWeights(const Artifact& artifact) {
  std::string path = artifact.folder + "/weights.safetensors";
  MappedFile file(path);
  uint64_t header_size = 0;
  if (file.size() < sizeof(header_size)) throw std::runtime_error(path + " is truncated");
  std::memcpy(&header_size, file.data(), sizeof(header_size));
  if (header_size > file.size() - sizeof(header_size)) throw std::runtime_error(path + " is truncated");
  json::Object header = ParseObject(std::string(file.data() + sizeof(header_size), header_size), path);
  const char* data = file.data() + sizeof(header_size) + header_size;
  size_t data_size = file.size() - sizeof(header_size) - header_size;
  std::vector<ffi::Tensor> weights;
  for (const std::string& name : artifact.weight_names) {
    json::Object entry = Entry<json::Object>(header, name.c_str(), path);
    DLDataType dtype = TypeOf(std::string(Entry<ffi::String>(entry, "dtype", path)));
    std::vector<int64_t> shape;
    size_t nbytes = dtype.bits / 8;
    for (const ffi::Any& size : Entry<json::Array>(entry, "shape", path)) {
      shape.push_back(size.cast<int64_t>());
      nbytes *= static_cast<size_t>(shape.back());
    }
    json::Array offsets = Entry<json::Array>(entry, "data_offsets", path);
    size_t begin = offsets[0].cast<int64_t>(), end = offsets[1].cast<int64_t>();
    if (end > data_size || begin > end || end - begin != nbytes) {
      throw std::runtime_error(path + ": the data of " + name + " are not where its header says");
    }
    weights.push_back(Allocate(shape, dtype, artifact.device));
    CopyFromHost(weights.back(), data + begin, nbytes);
  }
  return weights;
}

}  // namespace rotquant
