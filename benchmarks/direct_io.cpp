// What a disk gives to plain direct I/O from several threads: one file, all of it written and read
// in blocks of 8 MiB.
//
//   direct_io DIRECTORY BYTES [THREADS]
//
// Each line of its input, "write" or "read", is answered with one line of JSON. The file has no
// name and goes with the process. Where the file system refuses direct I/O, plain I/O is measured,
// and the answers say so.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr size_t kBlock = size_t{8} << 20;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "direct_io: %s: %s\n", what, std::strerror(errno));
  std::exit(1);
}

class File {
 public:
  File(std::string directory, size_t bytes) : bytes_(bytes) {
    std::string path = std::move(directory) + "/.direct-io-XXXXXX";
    fd_ = mkostemp(path.data(), O_CLOEXEC);
    if (fd_ < 0) fail("no file can be made");
    unlink(path.c_str());
    // As the pool does it: room first, so that a full disk shows before any byte is written.
    const auto end = static_cast<off_t>(bytes);
    if (fallocate(fd_, 0, 0, end) != 0 && (errno != EOPNOTSUPP || ftruncate(fd_, end) != 0)) {
      fail("no room for the file");
    }
    direct_ = try_direct();
  }
  ~File() { close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool direct() const { return direct_; }
  size_t bytes() const { return bytes_; }

  void transfer(bool writing, char* memory, size_t bytes, size_t offset) const {
    for (size_t done = 0; done < bytes;) {
      const auto at = static_cast<off_t>(offset + done);
      const ssize_t moved = writing ? pwrite(fd_, memory + done, bytes - done, at)
                                    : pread(fd_, memory + done, bytes - done, at);
      if (moved > 0) {
        done += static_cast<size_t>(moved);
      } else if (moved == 0 || errno != EINTR) {
        fail(writing ? "a write failed" : "a read failed");
      }
    }
  }

 private:
  // Some file systems take the flag and then refuse the transfers.
  bool try_direct() const {
    const int flags = fcntl(fd_, F_GETFL);
    if (fcntl(fd_, F_SETFL, flags | O_DIRECT) != 0) return false;
    alignas(4096) static char block[4096];
    if (pwrite(fd_, block, sizeof block, 0) == static_cast<ssize_t>(sizeof block)) return true;
    if (fcntl(fd_, F_SETFL, flags) != 0) fail("direct I/O cannot be switched off");
    return false;
  }

  size_t bytes_;
  int fd_ = -1;
  bool direct_ = false;
};

// One block of memory per thread, touched, so that no page is made while the clock runs.
class Buffers {
 public:
  explicit Buffers(size_t count)
      : bytes_(count * kBlock),
        data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (data_ == MAP_FAILED) fail("no memory");
    std::memset(data_, 0x5a, bytes_);
  }
  ~Buffers() { munmap(data_, bytes_); }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;
  char* operator[](size_t index) const { return static_cast<char*>(data_) + index * kBlock; }

 private:
  size_t bytes_;
  void* data_;
};

double run(const File& file, const Buffers& buffers, size_t threads, bool writing) {
  std::atomic<size_t> next{0};
  const auto start = std::chrono::steady_clock::now();
  const auto work = [&](size_t index) {
    while (true) {
      const size_t offset = next.fetch_add(kBlock);
      if (offset >= file.bytes()) return;
      file.transfer(writing, buffers[index], std::min(kBlock, file.bytes() - offset), offset);
    }
  };
  std::vector<std::thread> others;
  for (size_t index = 1; index < threads; ++index) others.emplace_back(work, index);
  work(0);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: direct_io DIRECTORY BYTES [THREADS]\n");
    return 2;
  }
  const File file(argv[1], std::strtoull(argv[2], nullptr, 10) / 4096 * 4096);
  const size_t threads = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 8;
  const Buffers buffers(threads);
  std::string command;
  while (std::getline(std::cin, command)) {
    const double seconds = run(file, buffers, threads, command == "write");
    std::printf("{\"seconds\": %.9f, \"direct\": %s, \"threads\": %zu}\n", seconds,
                file.direct() ? "true" : "false", threads);
    std::fflush(stdout);
  }
  return 0;
}
