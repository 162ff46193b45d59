// The internals of the CPU kernels as a Python module, for tests/test_native.py and test_native_plan.py.
// Arrays are numpy's; every one is checked for its type and for the elements the call reads or writes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/plan.h"
#include "probes.h"

namespace py = pybind11;
using fastac::DType;
using fastac::probe::Probes;

namespace {

// A C-contiguous array of at least `count` elements; `size` is that of an element.
void check(const py::array& array, int64_t size, int64_t count, const char* name) {
  if (!(array.flags() & py::array::c_style))
    throw std::invalid_argument(std::string(name) + " is not contiguous");
  if (array.itemsize() != size || array.size() < count)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(count) + " elements of " +
                                std::to_string(size) + " bytes, got " + std::to_string(array.size()) +
                                " of " + std::to_string(array.itemsize()));
}
const void* in(const py::array& array, int64_t size, int64_t count, const char* name) {
  check(array, size, count, name);
  return array.data();
}
void* out(py::array& array, int64_t size, int64_t count, const char* name) {
  check(array, size, count, name);
  return array.mutable_data();
}
const int64_t* positions(const py::object& position, int64_t count) {
  if (position.is_none()) return nullptr;
  return static_cast<const int64_t*>(in(py::cast<py::array>(position), 8, count, "position"));
}
void expect(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

int64_t storage_size(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}
int64_t accumulator_size(DType type) {
  return type == DType::kFloat64 ? 8 : 4;
}
int64_t accumulator_size(bool f64) {
  return f64 ? 8 : 4;
}

// One instruction set. Every method that takes `f64` or a DType finds the lanes of its accumulator with
// lanes().
struct Isa {
  const Probes& probes;

  template <typename Type>
  int64_t lanes(Type type) const {
    return probes.vector_bytes / accumulator_size(type);
  }
  template <typename Type>
  int64_t panel(Type type) const {
    return lanes(type) * probes.tile_vectors;
  }
  template <typename Type>
  int64_t padded(Type type, int64_t features) const {
    return (features + panel(type) - 1) / panel(type) * panel(type);
  }

  void exponential(bool f64, const py::array& x, py::array& y) const {
    const int64_t size = accumulator_size(f64), vectors = x.size() / lanes(f64);
    expect(x.size() % lanes(f64) == 0, "x is not whole vectors");
    probes.exponential(f64, in(x, size, 0, "x"), out(y, size, x.size(), "y"), vectors);
  }
  void load(DType type, const py::array& from, py::array& to) const {
    expect(from.size() % lanes(type) == 0, "from is not whole vectors");
    probes.load(type, in(from, storage_size(type), 0, "from"),
                out(to, accumulator_size(type), from.size(), "to"), from.size() / lanes(type));
  }
  void store(DType type, const py::array& from, py::array& to) const {
    expect(from.size() % lanes(type) == 0, "from is not whole vectors");
    probes.store(type, in(from, accumulator_size(type), 0, "from"),
                 out(to, storage_size(type), from.size(), "to"), from.size() / lanes(type));
  }
  // `count` elements at element `at` of `from`, whose end may be the end of readable memory.
  void load_partial(DType type, const py::array& from, int64_t at, int64_t count, py::array& to) const {
    expect(count >= 0 && count <= lanes(type) && at >= 0, "at or count is out of range");
    const auto* p = static_cast<const char*>(in(from, storage_size(type), at + count, "from"));
    probes.load_partial(type, p + at * storage_size(type), out(to, accumulator_size(type), lanes(type), "to"),
                        count);
  }
  void store_partial(DType type, const py::array& from, py::array& to, int64_t at, int64_t count) const {
    expect(count >= 0 && count <= lanes(type) && at >= 0, "at or count is out of range");
    auto* p = static_cast<char*>(out(to, storage_size(type), at + count, "to"));
    probes.store_partial(type, in(from, accumulator_size(type), lanes(type), "from"),
                         p + at * storage_size(type), count);
  }

  std::pair<std::vector<int64_t>, std::vector<int64_t>> balanced(int64_t total, int64_t limit) const {
    const size_t parts = size_t((total + limit - 1) / limit);
    std::vector<int64_t> starts(parts, -1), lengths(parts, -1);
    probes.balanced(total, limit, starts.data(), lengths.data());
    return {starts, lengths};
  }
  void fold(bool f64, const py::array& v, py::array& sums) const {
    const int64_t size = accumulator_size(f64), n = lanes(f64);
    probes.fold(f64, in(v, size, n * n, "v"), out(sums, size, n, "sums"));
  }
  void fold_all(bool f64, const py::array& v, int64_t count, py::array& sums) const {
    expect(count >= 1 && count <= probes.dot_tile * probes.dot_tile, "count is out of range");
    const int64_t size = accumulator_size(f64);
    probes.fold_all(f64, in(v, size, count * lanes(f64), "v"), count, out(sums, size, count, "sums"));
  }
  void horizontal_sum(bool f64, const py::array& v, py::array& sum) const {
    const int64_t size = accumulator_size(f64);
    probes.horizontal_sum(f64, in(v, size, lanes(f64), "v"), out(sum, size, 1, "sum"));
  }
  void transpose_block(bool f64, py::array& block) const {
    probes.transpose_block(f64, out(block, accumulator_size(f64), lanes(f64) * lanes(f64), "block"));
  }
  void transpose(bool f64, const py::array& from, int64_t from_stride, int64_t rows, int64_t columns,
                 py::array& to, int64_t to_stride) const {
    const int64_t n = lanes(f64), size = accumulator_size(f64);
    const int64_t wide = (columns + n - 1) / n * n, high = (rows + n - 1) / n * n;
    expect(from_stride % n == 0 && to_stride % n == 0 && wide <= from_stride && high <= to_stride,
           "bad stride");
    probes.transpose(f64, in(from, size, rows * from_stride, "from"), from_stride, rows, columns,
                     out(to, size, columns * to_stride, "to"), to_stride);
  }
  void dot_rows(bool f64, const py::array& p, int64_t count, const py::array& q, int64_t rows, int64_t panels,
                py::array& dots, int64_t stride) const {
    expect(count >= 1 && count <= probes.dot_tile && rows >= 1 && stride >= count, "count, rows or stride");
    const int64_t size = accumulator_size(f64), width = panels * panel(f64);
    probes.dot_rows(f64, in(p, size, count * width, "p"), count, in(q, size, rows * width, "q"), rows, panels,
                    out(dots, size, (rows - 1) * stride + count, "dots"), stride);
  }
  void multiply_add(bool f64, int64_t rows, int64_t vectors, bool by_panel, const py::array& fill,
                    const py::array& column_factor, const py::array& row_factor, const py::array& row,
                    int64_t row_step, const py::array& column, int64_t count, py::array& to) const {
    expect(rows >= 1 && rows <= probes.tile_rows && vectors >= 1 && vectors <= probes.tile_vectors,
           "tile size");
    const int64_t size = accumulator_size(f64), width = vectors * lanes(f64),
                  apart = by_panel ? panel(f64) : 1;
    const int64_t last = count > 0 ? (count - 1) * row_step + (rows - 1) * apart + 1 : 0;
    probes.multiply_add(f64, rows, vectors, by_panel, in(fill, size, rows, "fill"),
                        in(column_factor, size, width, "column_factor"),
                        in(row_factor, size, rows, "row_factor"), in(row, size, last, "row"), row_step,
                        in(column, size, count * width, "column"), count,
                        out(to, size, rows * panel(f64), "to"));
  }
  void panel_tile(bool f64, int64_t start, int64_t rows, py::array& to, const py::array& scale,
                  const py::array& row, int64_t row_step, const py::array& column, int64_t count) const {
    expect(rows >= 1 && rows <= probes.tile_rows && start >= 0 && start <= 2, "tile size or start");
    const int64_t size = accumulator_size(f64), last = count > 0 ? (count - 1) * row_step + rows : 0;
    probes.panel_tile(f64, start, rows, out(to, size, rows * panel(f64), "to"),
                      in(scale, size, rows, "scale"), in(row, size, last, "row"), row_step,
                      in(column, size, count * panel(f64), "column"), count);
  }

  void pack_rows(DType type, const py::array& x, int64_t stride, const py::object& position, int64_t begin,
                 int64_t count, int64_t features, py::array& panels, py::array& offset) const {
    const int64_t* list = positions(position, begin + count);
    int64_t last = begin + count - 1;
    if (list != nullptr) {
      last = 0;
      for (int64_t i = begin; i < begin + count; ++i) last = std::max(last, list[i]);
    }
    const int64_t size = accumulator_size(type);
    probes.pack_rows(type, in(x, storage_size(type), last * stride + features, "x"), stride, list, begin,
                     count, features, out(panels, size, count * padded(type, features), "panels"),
                     out(offset, size, count, "offset"));
  }
  void row_offset(DType type, const py::array& row, py::array& offset) const {
    probes.row_offset(type, in(row, storage_size(type), 1, "row"), row.size(),
                      out(offset, accumulator_size(type), 1, "offset"));
  }
  void pack_matrix(DType type, const py::array& rows, int64_t count, int64_t features, int64_t index,
                   py::array& to) const {
    expect(index >= 0 && index * panel(type) < features, "panel is out of range");
    probes.pack_matrix(type, in(rows, storage_size(type), count * features, "rows"), count, features, index,
                       out(to, accumulator_size(type), count * panel(type), "to"));
  }
  void pack_transposed(DType type, const py::array& weight, int64_t units, int64_t features, int64_t first,
                       py::array& to, py::array& sums) const {
    expect(first >= 0 && first < units, "first is out of range");
    const int64_t size = accumulator_size(type);
    probes.pack_transposed(type, in(weight, storage_size(type), units * features, "weight"), units, features,
                           first, out(to, size, padded(type, features) * lanes(type), "to"),
                           out(sums, size, lanes(type), "sums"));
  }
  bool streams(DType type, uintptr_t address, int64_t features, int64_t bytes) const {
    return probes.streams(type, reinterpret_cast<const void*>(address), features,
                          bytes);  // looks at the address only
  }
  void store_panel(DType type, py::array& row, int64_t at, int64_t index, int64_t features,
                   const py::array& value, bool stream) const {
    expect(at >= 0 && index >= 0 && index * panel(type) < features, "at or panel is out of range");
    auto* p =
        static_cast<char*>(out(row, storage_size(type), at + features, "row")) + at * storage_size(type);
    expect(!stream || reinterpret_cast<uintptr_t>(p) % uintptr_t(probes.vector_bytes) == 0,
           "row is not aligned");
    probes.store_panel(type, p, index, features, in(value, accumulator_size(type), panel(type), "value"),
                       stream);
  }

  void score_block(bool f64, const py::array& panels, const py::array& offset, int64_t rows, int64_t features,
                   const py::array& weight, const py::array& weight_sums, int64_t vectors, py::array& scores,
                   int64_t stride) const {
    const int64_t size = accumulator_size(f64), units = vectors * lanes(f64), width = padded(f64, features);
    expect(rows >= 1 && stride >= units, "rows or stride");
    probes.score_block(f64, in(panels, size, rows * width, "panels"), in(offset, size, rows, "offset"), rows,
                       features, in(weight, size, units * width, "weight"),
                       in(weight_sums, size, units, "weight_sums"), vectors,
                       out(scores, size, rows * stride, "scores"), stride);
  }
  void gather_scores(bool f64, const py::array& base, int64_t unit_stride, int64_t position_stride,
                     const py::object& position, int64_t begin, int64_t rows, int64_t unit_begin,
                     int64_t units, py::array& scores, int64_t stride) const {
    const int64_t size = accumulator_size(f64);
    const int64_t* list = positions(position, begin + rows);
    for (int64_t r = begin; r < begin + rows; ++r)
      in(base, size, (list ? list[r] : r) * position_stride + (unit_begin + units - 1) * unit_stride + 1,
         "base");
    probes.gather_scores(f64, base.data(), unit_stride, position_stride, list, begin, rows, unit_begin, units,
                         out(scores, size, rows * stride, "scores"), stride);
  }
  void add_position_bias(bool f64, const py::array& bias, int64_t max_length, const py::object& position,
                         int64_t begin, int64_t rows, int64_t units, py::array& scores,
                         int64_t stride) const {
    const int64_t size = accumulator_size(f64);
    const int64_t* list = positions(position, begin + rows);
    for (int64_t r = begin; r < begin + rows; ++r)
      expect((list ? list[r] : r) < max_length, "position is out of range");
    probes.add_position_bias(f64, in(bias, size, units * max_length, "bias"), max_length, list, begin, rows,
                             units, out(scores, size, rows * stride, "scores"), stride);
  }
  void softmax_reset(bool f64, py::array& state) const {
    expect(state.size() % 4 == 0, "state is not four rows");
    probes.softmax_reset(f64, out(state, accumulator_size(f64), 0, "state"), state.size() / 4);
  }
  void softmax_block(bool f64, py::array& state, py::array& scores, int64_t stride, const py::array& offset,
                     int64_t rows, int64_t vectors) const {
    const int64_t size = accumulator_size(f64), units = vectors * lanes(f64);
    expect(stride >= units, "stride");
    probes.softmax_block(f64, out(state, size, 4 * units, "state"),
                         out(scores, size, rows * stride, "scores"), stride, in(offset, size, rows, "offset"),
                         rows, vectors);
  }
};

// What csrc/cpu/dispatch.cpp demands of the processor, and F16C, which the files are compiled for as well.
py::object isa(const std::string& name) {
  if (name == "baseline") return py::cast(Isa{fastac::probe::baseline});
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (name == "avx2") return avx2 ? py::cast(Isa{fastac::probe::avx2}) : py::none();
  if (name == "avx512") return avx512 ? py::cast(Isa{fastac::probe::avx512}) : py::none();
  if (name == "avx512_bf16") return avx512_bf16 ? py::cast(Isa{fastac::probe::avx512_bf16}) : py::none();
  if (name == "avx512_bf16_dot")
    return avx512_bf16 ? py::cast(Isa{fastac::probe::avx512_bf16_dot}) : py::none();
#else
  for (const char* known : {"avx2", "avx512", "avx512_bf16", "avx512_bf16_dot"})
    if (name == known) return py::none();
#endif
  throw std::invalid_argument("no instruction set is called " + name);
}

// Lengths are all the planner may look at: the other members of Sets are null, or point to what they get.
fastac::Sets sets_of(const std::vector<int64_t>& length, const std::vector<int64_t>& others, int64_t rows) {
  expect(others.empty() || others.size() >= length.size(), "others is too short");
  const int64_t* p = others.empty() ? nullptr : others.data();
  return {int64_t(length.size()), length.data(), p, p, p, p, rows};
}

py::list segments_of(const std::vector<fastac::cpu::Segment>& segments) {
  py::list list;
  for (const auto& s : segments) list.append(py::make_tuple(s.set, s.begin, s.end, s.partial));
  return list;
}
py::list ranges_of(const std::vector<fastac::cpu::Range>& ranges) {
  py::list list;
  for (const auto& r : ranges) list.append(py::make_tuple(r.begin, r.end));
  return list;
}
py::dict plan_of(const fastac::cpu::Plan& plan) {
  py::dict d;
  d["block_rows"] = plan.block_rows;
  d["unit_block"] = plan.unit_block;
  d["partials"] = plan.partials;
  d["segments"] = segments_of(plan.segments);
  d["tasks"] = ranges_of(plan.tasks);
  return d;
}

// Addresses, relative to a base aligned to kAlignment, of arrays of `counts` doubles, and the bytes they take
// in all.
std::pair<std::vector<int64_t>, int64_t> arena(const std::vector<int64_t>& counts) {
  fastac::cpu::Arena measure;
  for (int64_t count : counts) measure.take<double>(count);
  const fastac::cpu::Buffer buffer = fastac::cpu::allocate(measure.used());
  expect(reinterpret_cast<uintptr_t>(buffer.get()) % fastac::cpu::kAlignment == 0,
         "the buffer is not aligned");
  fastac::cpu::Arena carve(buffer.get());
  std::vector<int64_t> at;
  for (int64_t count : counts)
    at.push_back(reinterpret_cast<char*>(carve.take<double>(count)) - static_cast<char*>(buffer.get()));
  expect(carve.used() == measure.used(), "carving used other sizes than measuring");
  return {at, carve.used()};
}

}  // namespace

PYBIND11_MODULE(harness, m) {
  namespace cpu = fastac::cpu;
  py::enum_<DType>(m, "DType")
      .value("float64", DType::kFloat64)
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);

  py::class_<Isa>(m, "Isa")
      .def_property_readonly("tile_rows", [](const Isa& i) { return i.probes.tile_rows; })
      .def_property_readonly("tile_vectors", [](const Isa& i) { return i.probes.tile_vectors; })
      .def_property_readonly("dot_tile", [](const Isa& i) { return i.probes.dot_tile; })
      .def_property_readonly("dot_bytes", [](const Isa& i) { return i.probes.dot_bytes; })
      .def_property_readonly("vector_bytes", [](const Isa& i) { return i.probes.vector_bytes; })
      .def("exponential", &Isa::exponential)
      .def("load", &Isa::load)
      .def("store", &Isa::store)
      .def("load_partial", &Isa::load_partial)
      .def("store_partial", &Isa::store_partial)
      .def("balanced", &Isa::balanced)
      .def("fold", &Isa::fold)
      .def("fold_all", &Isa::fold_all)
      .def("horizontal_sum", &Isa::horizontal_sum)
      .def("transpose_block", &Isa::transpose_block)
      .def("transpose", &Isa::transpose)
      .def("dot_rows", &Isa::dot_rows)
      .def("multiply_add", &Isa::multiply_add)
      .def("panel_tile", &Isa::panel_tile)
      .def("pack_rows", &Isa::pack_rows)
      .def("row_offset", &Isa::row_offset)
      .def("pack_matrix", &Isa::pack_matrix)
      .def("pack_transposed", &Isa::pack_transposed)
      .def("streams", &Isa::streams)
      .def("store_panel", &Isa::store_panel)
      .def("score_block", &Isa::score_block)
      .def("gather_scores", &Isa::gather_scores)
      .def("add_position_bias", &Isa::add_position_bias)
      .def("softmax_reset", &Isa::softmax_reset)
      .def("softmax_block", &Isa::softmax_block);

  m.def("isa", &isa, "An instruction set, or None if this processor cannot run it");
  m.def("arena", &arena);
  m.def("make_segments", [](const std::vector<int64_t>& length, int64_t units) {
    return segments_of(cpu::make_segments(sets_of(length, {}, 0), units));
  });
  m.def("balance", [](const std::vector<int64_t>& rows, int64_t count, int64_t fixed) {
    std::vector<cpu::Segment> segments;
    for (int64_t n : rows) segments.push_back({int64_t(segments.size()), 0, n, -1});
    return ranges_of(cpu::balance(segments, count, fixed));
  });
  m.def(
      "plan_forward",
      [](const std::vector<int64_t>& length, int64_t units, int64_t features,
         const std::vector<int64_t>& others) {
        return plan_of(cpu::plan_forward(sets_of(length, others, 0), units, features));
      },
      py::arg("lengths"), py::arg("units"), py::arg("features"), py::arg("others") = std::vector<int64_t>{});
  m.def(
      "plan_backward",
      [](const std::vector<int64_t>& length, int64_t rows, int64_t units, int64_t features,
         bool parameter_gradients, const std::vector<int64_t>& others) {
        return plan_of(
            cpu::plan_backward(sets_of(length, others, rows), units, features, parameter_gradients));
      },
      py::arg("lengths"), py::arg("rows"), py::arg("units"), py::arg("features"),
      py::arg("parameter_gradients"), py::arg("others") = std::vector<int64_t>{});
  m.attr("forward_tasks") = cpu::kForwardTasks;
  m.attr("few_tasks") = cpu::kFewTasks;
  m.attr("unit_elements") = cpu::kUnitElements;
  m.attr("alignment") = cpu::kAlignment;
}
