// Runs the index functions of the CUDA kernels in a loop over (block, thread), as csrc/cuda.cu calls them: every element of every
// tensor must be touched exactly once, where it lies, in the order that sums rely on. Prints what is wrong; the exit code tells.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/mapping.h"

using namespace metaadamw;

#define REQUIRE(condition)                                                  \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::printf("line %d, %s: %s\n", __LINE__, what.c_str(), #condition); \
      std::exit(1);                                                         \
    }                                                                       \
  } while (false)

namespace {

constexpr int kOperands = 6;
using Row = metaadamw::Row<kOperands>;
using Layout = metaadamw::Layout<kOperands>;
using Table = metaadamw::Table<kOperands>;

// A table in host memory, as checks.h lays it out; addresses are numbers only, nothing is read or written there.
struct Memory {
  std::vector<int64_t> words;
  Header header{};

  Memory(const std::vector<Row>& rows, const std::vector<Layout>& layouts) {
    std::vector<int64_t> first_chunk{0};
    for (const Row& row : rows) {
      first_chunk.push_back(first_chunk.back() + chunks_of(row.numel, kChunkOnGpu));
    }
    header.tensors = rows.size();
    header.chunk_size = kChunkOnGpu;
    header.chunks = first_chunk.back();
    header.layouts = layouts.size();
    header.copied_bytes = Table::copied_bytes(header);
    words.resize(header.copied_bytes / 8);
    const Table into = table();
    std::copy(rows.begin(), rows.end(), into.rows);
    std::copy(first_chunk.begin(), first_chunk.end(), into.first_chunk);
    std::copy(layouts.begin(), layouts.end(), into.layouts);
    for (size_t t = 0; t < rows.size(); ++t) {
      std::fill(into.tensor_of_chunk + first_chunk[t], into.tensor_of_chunk + first_chunk[t + 1], static_cast<int32_t>(t));
    }
  }
  Table table() { return Table(header, reinterpret_cast<char*>(words.data())); }
};

struct Kind {
  const char* name;
  std::vector<ElementType> types;  // of grad, momentum, param, second moment, maximum, low-precision parameter
  int vector;
};

const ElementType f32 = ElementType::kFloat32, f64 = ElementType::kFloat64, bf16 = ElementType::kBFloat16,
                  f16 = ElementType::kFloat16;
const Kind kKinds[] = {
    {"fp32", {f32, f32, f32, f32, f32, f16}, 4},
    {"bf16", {bf16, bf16, bf16, bf16, bf16, bf16}, 8},
    {"mixed", {bf16, f32, f16, f32, bf16, bf16}, 4},
    {"fp64", {f64, f32, f64, bf16, f64, f16}, 1},
};

Row make_row(const Kind& kind, int64_t numel, int64_t offset, int shifted) {
  Row row{};
  row.numel = numel;
  row.layout = -1;
  row.dense = (1 << kOperands) - 1;
  row.is_double = kind.vector == 1;
  row.vector = kind.vector;
  for (int i = 0; i < kOperands; ++i) {
    row.type[i] = kind.types[i];
    row.data[i] = reinterpret_cast<char*>((i + 1) * (int64_t{1} << 42) + (i == shifted ? offset * itemsize(row.type[i]) : 0));
  }
  return row;
}

// Where element `index` of a tensor lies, in the plainest way.
char* place(const Table& table, const Row& row, int operand, int64_t index) {
  const Layout* layout = row.is_dense(operand) ? nullptr : &table.layouts[row.layout];
  return row.data[operand] +
         (layout ? strided_offset(layout->shape, layout->stride[operand], index) : index) * itemsize(row.type[operand]);
}

template <int V, bool ahead>
void run_thread(const Table& table, const Chunk& chunk, int thread, const Layout& layout, const int64_t* coordinates,
                std::vector<int>& touched, std::vector<int>& order, const std::string& what) {
  const Row& row = table.rows[chunk.tensor];
  const bool whole = has_whole_groups(row, (1 << kOperands) - 1);
  int loads = 0, groups = 0;
  for_each_group<V, ahead>(
      thread, chunk.count, whole,
      [&](int first) {
        REQUIRE(first >= 0 && first + V <= chunk.count);
        REQUIRE(loads++ - groups <= (ahead ? 1 : 0));
        return first;
      },
      [&](int first, int loaded) {
        REQUIRE(whole && V > 1 && loaded == first && groups++ < loads);
        for (int i = 0; i < kOperands; ++i) {
          const int size = itemsize(row.type[i]);
          char* address = row.data[i] + chunk.first * size + first * size;  // as Work.base and load_group have it
          REQUIRE(V * size <= 16 && V * size >= 8 && reinterpret_cast<uintptr_t>(address) % (V * size) == 0);
          REQUIRE(address == place(table, row, i, chunk.first + first));
        }
        for (int k = 0; k < V; ++k) {
          ++touched[first + k];
          order.push_back(first + k);
        }
      },
      [&](int begin, int end) {
        REQUIRE(!whole || V == 1 || chunk.count - begin / V * V < V);  // only what is not a whole group
        REQUIRE(begin < end && end - begin <= kPart && begin % (V < kPart ? V : kPart) == 0);
        for (int index = begin; index < end; ++index) {
          for (int i = 0; i < kOperands; ++i) {
            REQUIRE(address_in_chunk(row, layout, i, chunk.first, coordinates, table.chunk_size, index) ==
                    place(table, row, i, chunk.first + index));
          }
          ++touched[index];
          order.push_back(index);
        }
      });
  REQUIRE(loads == groups);
}

// All threads of one block. Returns the elements in the order in which its threads take them.
template <bool ahead>
std::vector<int> run_block(const Table& table, int64_t block, const std::string& what) {
  const Chunk chunk = chunk_of_block(table, block);
  const Row& row = table.rows[chunk.tensor];
  REQUIRE(chunk.number == block && chunk.count >= 0 && chunk.count <= kChunkOnGpu && chunk.first % kChunkOnGpu == 0);
  REQUIRE(chunk.first + chunk.count <= row.numel && (chunk.count == kChunkOnGpu || chunk.first + chunk.count == row.numel));
  int64_t coordinates[kMaxDims];
  Layout layout{};
  if (row.layout >= 0) {
    layout = table.layouts[row.layout];
    coordinates_of(layout.shape, chunk.first, coordinates);
  }
  std::vector<int> touched(chunk.count, 0), order;
  for (int thread = 0; thread < kThreads; ++thread) {
    const size_t before = order.size();
    (row.is_double     ? run_thread<1, ahead>
     : row.vector == 4 ? run_thread<4, ahead>
                       : run_thread<8, ahead>)(table, chunk, thread, layout, coordinates, touched, order, what);
    for (size_t i = before + 1; i < order.size(); ++i) {
      REQUIRE(order[i - 1] < order[i]);
    }
  }
  for (const int times : touched) {
    REQUIRE(times == 1);
  }
  return order;
}

// In the same order whether the next group is loaded ahead or not.
std::vector<int> run_block(const Table& table, int64_t block, const std::string& what) {
  std::vector<int> order = run_block<false>(table, block, what);
  REQUIRE(run_block<true>(table, block, what) == order);
  return order;
}

// Every chunk of every tensor belongs to exactly one block.
void check_blocks(const Table& table, const std::string& what) {
  int64_t block = 0;
  for (int64_t t = 0; t < table.tensors; ++t) {
    int64_t elements = 0;
    do {
      const Chunk chunk = chunk_of_block(table, block++);
      REQUIRE(chunk.tensor == t && chunk.first == elements);
      elements += chunk.count;
    } while (elements < table.rows[t].numel);
  }
  REQUIRE(block == table.chunks);
}

void sizes_and_alignments() {
  std::vector<int64_t> sizes{0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17};
  for (const int64_t edge : {int64_t{kThreads}, int64_t{kThreads * 4}, int64_t{kThreads * 8}, kChunkOnGpu, 2 * kChunkOnGpu}) {
    for (const int64_t more : {-9, -8, -7, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 8, 9}) {
      sizes.push_back(edge + more);
    }
  }
  for (const Kind& kind : kKinds) {
    std::vector<Row> aligned;
    for (const int64_t numel : sizes) {
      aligned.push_back(make_row(kind, numel, 0, 0));
    }
    Memory memory(aligned, {});
    check_blocks(memory.table(), kind.name);
    for (int64_t block = 0; block < memory.header.chunks; ++block) {
      const std::vector<int> order = run_block(memory.table(), block, kind.name);
      const Chunk chunk = chunk_of_block(memory.table(), block);
      for (int shifted = 0; shifted < kOperands; ++shifted) {
        for (const int64_t offset : {1, 2, 4, 8}) {
          Memory other({make_row(kind, sizes[chunk.tensor], offset, shifted)}, {});
          const std::string what = std::string(kind.name) + ", misaligned";
          REQUIRE(run_block(other.table(), chunk.first / kChunkOnGpu, what) == order);
        }
      }
    }
  }
}

void layouts() {
  std::mt19937_64 random(0);
  const auto draw = [&](int64_t low, int64_t high) { return low + static_cast<int64_t>(random() % (high - low + 1)); };
  for (int round = 0; round < 400; ++round) {
    const std::string what = "layout " + std::to_string(round);
    Layout layout{};
    Shape& shape = layout.shape;
    shape.dims = static_cast<int>(draw(1, 5));
    int64_t numel = 1;
    for (int d = 0; d < shape.dims; ++d) {
      shape.size[d] = draw(0, 9) == 0 ? draw(40000, 70000) : draw(1, round % 2 ? 9 : 60);
      shape.size[d] = numel * shape.size[d] > int64_t{1} << 33 ? 2 : shape.size[d];  // a table names every chunk
      numel *= shape.size[d];
      for (int i = 0; i < kOperands; ++i) {
        layout.stride[i][d] = draw(0, 5) == 0 ? 0 : draw(1, int64_t{1} << draw(1, 33));
      }
    }
    Row row = make_row(kKinds[round % 4], numel, 0, 0);
    row.layout = 0;
    row.dense = static_cast<uint8_t>(round % 8 == 0 ? 0b10101 : 0);
    Memory memory({row}, {layout});
    run_block(memory.table(), 0, what);
    run_block(memory.table(), memory.header.chunks / 2, what);
    run_block(memory.table(), memory.header.chunks - 1, what);
  }
}

// Beyond 2^31 and 2^32 elements and bytes.
void huge_tensors() {
  const int64_t numel = (int64_t{1} << 33) + 5;
  Layout layout{};
  layout.shape.dims = 2;
  layout.shape.size[0] = 3;
  layout.shape.size[1] = numel / 3;
  for (auto& stride : layout.stride) {
    stride[0] = 1;
    stride[1] = 3;
  }
  for (const Kind& kind : kKinds) {
    std::vector<Row> rows(3, make_row(kind, numel, 0, 0));
    rows[2].numel = numel / 3 * 3;
    rows[2].layout = 0;
    rows[2].dense = 0;
    Memory memory(rows, {layout});
    for (int64_t block = 0; block < memory.header.chunks; block += 65521) {
      run_block(memory.table(), block, kind.name);
    }
    run_block(memory.table(), memory.table().first_chunk[1] - 1, kind.name);
    run_block(memory.table(), memory.header.chunks - 1, kind.name);
  }
}

}  // namespace

int main() {
  sizes_and_alignments();
  layouts();
  huge_tensors();
  return 0;
}
