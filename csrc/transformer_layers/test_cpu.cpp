// SPDX-License-Identifier: Apache-2.0
// transformer_layers on the CPU against its parts, called one by one: the same bits, on every instruction set this
// machine runs and on any number of threads. The parts have programs of their own.
#include <cstring>

#include "attention/attention.h"
#include "base/testing.h"
#include "layer_norm/layer_norm.h"
#include "linear_act/linear_act.h"
#include "transformer_layers/transformer_layers.h"

using namespace ctxfast;

namespace {

// Memory of elements that are float32 or bfloat16, on a cache line.
struct Values {
  DType io_dtype;
  int64_t n;
  void* memory;
  Values(DType io_dtype, int64_t n)
      : io_dtype(io_dtype), n(n), memory(std::aligned_alloc(64, round_up(4 * n + 64, 64))) {
    std::memset(memory, 0x7f, round_up(4 * n + 64, 64));  // no number that results could be made of
  }
  Values(Values&& other) : io_dtype(other.io_dtype), n(other.n), memory(other.memory) { other.memory = nullptr; }
  Values(const Values&) = delete;
  ~Values() { std::free(memory); }

  void set(int64_t i, float value) {
    if (io_dtype == DType::kFloat32) {
      static_cast<float*>(memory)[i] = value;
    } else {
      static_cast<uint16_t*>(memory)[i] = to_bf16(value);
    }
  }
  bool operator==(const Values& other) const {
    return n == other.n && std::memcmp(memory, other.memory, n * (io_dtype == DType::kFloat32 ? 4 : 2)) == 0;
  }
};

Values random_values(Random* random, DType io_dtype, int64_t n, float scale, float shift = 0) {
  Values values(io_dtype, n);
  for (int64_t i = 0; i < n; ++i) values.set(i, shift + random->uniform(scale));
  return values;
}

// A product's weights, random, in the layout of linear_act/linear_act.h.
struct Weights {
  int64_t in, out;
  Values packed, bias;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  Weights(Random* random, DType io_dtype, DType weight_dtype, int64_t in, int64_t out)
      : in(in),
        out(out),
        packed(io_dtype, linear_act_packed_bytes(in, out, weight_dtype)),
        bias(random_values(random, io_dtype, out, 0.5f)),
        scales(random->fill(round_up(out, kLinearActPanel), 0.01f)),
        sums(scales.size(), 0) {
    std::memset(packed.memory, 0, linear_act_packed_bytes(in, out, weight_dtype));
    const int64_t per_word = weight_dtype == DType::kInt8 ? 4 : weight_dtype == DType::kBFloat16 ? 2 : 1;
    const int64_t tiles = ceil_div(in, kLinearActTileWords * per_word);
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t k = 0; k < in; ++k) {
        const int64_t word = k / per_word, column = o % kLinearActPanel;
        const int64_t at =
            (((o / kLinearActPanel * tiles + word / 16) * 2 + column / 16) * 16 + word % 16) * 16 + column % 16;
        if (weight_dtype == DType::kInt8) {
          static_cast<int8_t*>(packed.memory)[4 * at + k % 4] = static_cast<int8_t>(random->below(255) - 127);
        } else {
          packed.set(per_word * at + k % per_word, random->uniform(1.0f / std::sqrt(static_cast<float>(in))));
        }
      }
    }
  }
  TransformerProduct product(bool has_bias) const {
    return {packed.memory, scales.data(), sums.data(), has_bias ? bias.memory : nullptr};
  }
};

struct Layer {
  Weights qkv, project, widen, narrow;
  Values norms[4];

  Layer(Random* random, DType io_dtype, DType weight_dtype, int64_t hidden, int64_t wide)
      : qkv(random, io_dtype, weight_dtype, hidden, 3 * hidden),
        project(random, io_dtype, weight_dtype, hidden, hidden),
        widen(random, io_dtype, weight_dtype, hidden, wide),
        narrow(random, io_dtype, weight_dtype, wide, hidden),
        norms{random_values(random, io_dtype, hidden, 0.3f, 1.0f), random_values(random, io_dtype, hidden, 0.3f),
              random_values(random, io_dtype, hidden, 0.3f, 1.0f), random_values(random, io_dtype, hidden, 0.3f)} {}
  TransformerLayer packed(bool has_bias) const {
    return {qkv.product(has_bias),   project.product(has_bias), {norms[0].memory, norms[1].memory},
            widen.product(has_bias), narrow.product(has_bias),  {norms[2].memory, norms[3].memory}};
  }
};

struct Problem {
  DType io_dtype, weight_dtype;
  int64_t hidden, heads, wide, tokens = 0;
  bool has_bias;
  int64_t reach;  // of the relative bias, 0: none
  std::vector<int32_t> offsets = {0};
  Random random;
  Values x;
  std::vector<Layer> layers;
  std::vector<TransformerLayer> packed;
  std::vector<float> relative_bias;

  Problem(DType io_dtype, DType weight_dtype, const std::vector<int>& lengths, int64_t hidden, int64_t heads,
          int64_t wide, bool has_bias, int count = 1, int64_t reach = 0)
      : io_dtype(io_dtype),
        weight_dtype(weight_dtype),
        hidden(hidden),
        heads(heads),
        wide(wide),
        tokens(total(lengths)),
        has_bias(has_bias),
        reach(reach),
        random(static_cast<uint64_t>(hidden * 1000 + wide)),
        x(random_values(&random, io_dtype, tokens * hidden, 1.0f)) {
    for (const int length : lengths) offsets.push_back(offsets.back() + length);
    for (int i = 0; i < count; ++i) layers.emplace_back(&random, io_dtype, weight_dtype, hidden, wide);
    for (const Layer& layer : layers) packed.push_back(layer.packed(has_bias));
    for (int64_t i = 0; reach > 0 && i < heads * (2 * reach - 1); ++i) relative_bias.push_back(random.uniform(1.0f));
  }
  static int64_t total(const std::vector<int>& lengths) {
    int64_t sum = 0;
    for (const int length : lengths) sum += length;
    return sum;
  }

  TransformerLayersParams params(Isa isa, int64_t threads, void* const* y) const {
    TransformerLayersParams p;
    p.tokens = tokens, p.hidden = hidden, p.heads = heads, p.intermediate = wide;
    p.sequences = static_cast<int64_t>(offsets.size()) - 1;
    p.io_dtype = io_dtype, p.weight_dtype = weight_dtype, p.eps = 1e-12f;
    p.x = x.memory, p.cu_seqlens = offsets.data();
    p.relative_bias = reach > 0 ? relative_bias.data() : nullptr, p.reach = reach;
    p.layers = packed.data(), p.count = static_cast<int64_t>(packed.size());
    p.y = y;
    p.threads = threads, p.isa = isa;
    return p;
  }

  Values multiply(const Weights& w, const Values& from, Activation activation, bool adds, Isa isa,
                  Report* report) const {
    Values to(io_dtype, tokens * w.out);
    LinearActParams p;
    p.rows = tokens, p.in = w.in, p.out = w.out, p.weight_dtype = weight_dtype, p.io_dtype = io_dtype,
    p.activation = activation;
    p.x = from.memory, p.stride_x = w.in, p.packed = w.packed.memory, p.scales = w.scales.data();
    p.sums = w.sums.data(), p.bias = adds && has_bias ? w.bias.memory : nullptr, p.y = to.memory, p.isa = isa;
    report->that("linear_act", linear_act_forward(p).ok());
    return to;
  }

  Values normalise(const Values& rows, const Weights& w, const Values& residual, const Values* norm, Isa isa,
                   Report* report) const {
    Values to(io_dtype, tokens * hidden);
    LayerNormParams p;
    p.rows = tokens, p.size = hidden, p.io_dtype = io_dtype, p.sources = 2;
    p.source[0] = {rows.memory, hidden}, p.source[1] = {residual.memory, hidden};
    p.shift = has_bias ? w.bias.memory : nullptr, p.weight = norm[0].memory, p.bias = norm[1].memory;
    p.eps = 1e-12f, p.y = to.memory, p.isa = isa;
    report->that("layer_norm", layer_norm_forward(p).ok());
    return to;
  }

  Values by_parts(const Layer& layer, const Values& from, Isa isa, Report* report) const {
    const Values rows = multiply(layer.qkv, from, Activation::kNone, true, isa, report);
    Values context(io_dtype, tokens * hidden);
    AttentionParams p;
    p.tokens = tokens, p.heads = heads, p.head_dim = hidden / heads;
    p.sequences = static_cast<int64_t>(offsets.size()) - 1;
    p.io_dtype = io_dtype, p.qkv = rows.memory, p.stride_qkv = 3 * hidden, p.cu_seqlens = offsets.data();
    p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
    p.y = context.memory, p.stride_y = hidden, p.isa = isa;
    p.places.relative_bias = reach > 0 ? relative_bias.data() : nullptr, p.places.reach = reach;
    report->that("attention", attention_forward(p).ok());
    const Values projected = multiply(layer.project, context, Activation::kNone, false, isa, report);
    const Values h = normalise(projected, layer.project, from, layer.norms, isa, report);
    const Values between = multiply(layer.widen, h, Activation::kGelu, true, isa, report);
    const Values to_bf16 = multiply(layer.narrow, between, Activation::kNone, false, isa, report);
    return normalise(to_bf16, layer.narrow, h, layer.norms + 2, isa, report);
  }
};

void check_problem(const Problem& problem, Report* report) {
  const int64_t count = static_cast<int64_t>(problem.layers.size()), elements = problem.tokens * problem.hidden;
  for (const Isa isa : runnable_isas()) {
    const std::string name = std::string(isa_name(isa)) + " hidden " + std::to_string(problem.hidden) + " tokens " +
                             std::to_string(problem.tokens) + " layers " + std::to_string(count);
    std::vector<Values> want;
    for (const Layer& layer : problem.layers) {
      want.push_back(problem.by_parts(layer, want.empty() ? problem.x : want.back(), isa, report));
    }
    for (const int64_t threads : {1, 2, 5}) {
      Values last(problem.io_dtype, elements);
      std::vector<Values> every;
      std::vector<void*> places;
      for (int64_t i = 0; i < count; ++i) {
        every.emplace_back(problem.io_dtype, elements);
        places.push_back(every.back().memory);
      }
      TransformerLayersParams p = problem.params(isa, threads, &last.memory);
      const Status status = transformer_layers_forward(p);
      report->that(name + ": " + status.message, status.ok());
      report->that(name + " threads " + std::to_string(threads), last == want.back());
      p.y = places.data(), p.all_layers = true;
      report->that(name, transformer_layers_forward(p).ok());
      for (int64_t i = 0; i < count; ++i) {
        report->that(name + " layer " + std::to_string(i), every[i] == want[i]);
      }
    }
  }
}

void check_refusals(Report* report) {
  const Problem problem(DType::kFloat32, DType::kInt8, {3, 2}, 16, 2, 24, true);
  const int32_t falls[] = {0, 4, 3}, ends[] = {0, 3, 4};
  const auto refused = [&](const char* word, auto change) {
    Values y(DType::kFloat32, 5 * 16);
    TransformerLayersParams p = problem.params(Isa::kGeneric, 1, &y.memory);
    change(&p);
    const Status status = transformer_layers_forward(p);
    report->that(word, !status.ok() && status.message.find(word) != std::string::npos);
  };
  using P = TransformerLayersParams;
  refused("tokens", [](P* p) { p->tokens = -1; });
  refused("hidden", [](P* p) { p->hidden = 9000; });
  refused("heads", [](P* p) { p->heads = 3; });
  refused("intermediate", [](P* p) { p->intermediate = 0; });
  refused("threads", [](P* p) { p->threads = 0; });
  refused("io_dtype", [](P* p) { p->io_dtype = DType::kFloat16; });
  refused("weight_dtype", [](P* p) { p->weight_dtype = DType::kBFloat16; });
  refused("cu_seqlens", [](P* p) { p->cu_seqlens = nullptr; });
  refused("cu_seqlens[2]", [&](P* p) { p->cu_seqlens = falls; });
  refused("the end of cu_seqlens", [&](P* p) { p->cu_seqlens = ends; });
  refused("x", [](P* p) { p->x = nullptr; });
  refused("count", [](P* p) { p->count = 0; });
  void* const nowhere = nullptr;
  refused("y", [&](P* p) { p->y = &nowhere; });
  const float table = 0;
  refused("reach", [&](P* p) { p->relative_bias = &table; });
  refused("layers", [](P* p) { p->layers = nullptr; });
  TransformerLayer layers[2];
  const auto refused_layer = [&](const char* word, auto change) {
    layers[0] = layers[1] = problem.packed[0];
    change(&layers[1]);
    refused(word, [&](P* p) { p->layers = layers, p->count = 2; });
  };
  using L = TransformerLayer;
  refused_layer("norm", [](L* l) { l->output_norm.bias = nullptr; });
  refused_layer("packed", [](L* l) { l->widen.packed = nullptr; });
  refused_layer("packed is misaligned",
                [](L* l) { l->narrow.packed = static_cast<const char*>(l->narrow.packed) + 4; });
  refused_layer("sums", [](L* l) { l->qkv.sums = nullptr; });
}

}  // namespace

int main() {
  Report report;
  const struct {
    DType io_dtype, weight_dtype;
  } kinds[] = {{DType::kFloat32, DType::kFloat32},
               {DType::kBFloat16, DType::kBFloat16},
               {DType::kFloat32, DType::kInt8},
               {DType::kBFloat16, DType::kInt8}};
  for (const auto& kind : kinds) {
    check_problem({kind.io_dtype, kind.weight_dtype, {5, 0, 1, 17, 33}, 64, 4, 96, true}, &report);
    check_problem({kind.io_dtype, kind.weight_dtype, {3, 16}, 35, 5, 67, false, 2, 9}, &report);
    check_problem({kind.io_dtype, kind.weight_dtype, {2, 9}, 48, 3, 64, true, 3}, &report);
    check_problem({kind.io_dtype, kind.weight_dtype, {600, 1, 300}, 48, 3, 160, true},
                  &report);  // more rows than a pass
    check_problem({kind.io_dtype, kind.weight_dtype, {}, 32, 2, 32, true}, &report);
  }
  check_refusals(&report);
  return report.finish("test_transformer_layers");
}
