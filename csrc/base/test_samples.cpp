// SPDX-License-Identifier: Apache-2.0
// Samples of matrices: each sampled element is compared bit by bit, nothing else is read, and no row or column is left
// out, on any number of threads.
#include <algorithm>

#include "base/common.h"
#include "base/samples.h"
#include "base/testing.h"

using namespace ctxfast;

namespace {

struct Shape {
  int64_t rows, columns, size, width;
};

// A matrix of bytes, elements `apart` sizes apart in a row and rows two elements further than they need.
struct Matrix {
  Shape shape;
  int64_t apart, row_stride;
  std::vector<unsigned char> memory, saved;

  Matrix(Random* random, const Shape& shape, int64_t apart)
      : shape(shape), apart(apart * shape.size), row_stride((shape.columns * apart + 2) * shape.size) {
    memory.resize(shape.rows * row_stride);
    for (unsigned char& byte : memory) byte = static_cast<unsigned char>(random->bits());
    for (int64_t i = 0; i < shape.rows; ++i) {
      for (int64_t j = first(i); j < first(i) + shape.width; ++j) {
        saved.insert(saved.end(), at(i, j), at(i, j) + shape.size);
      }
    }
  }
  int64_t first(int64_t row) const {
    return std::min(row % ceil_div(shape.columns, shape.width) * shape.width, shape.columns - shape.width);
  }
  unsigned char* at(int64_t i, int64_t j) { return memory.data() + i * row_stride + j * apart; }
  Samples samples() const {
    return {memory.data(), shape.rows, row_stride, shape.columns, apart, shape.size, shape.width, saved.data()};
  }
};

void check(Report* report, Random* random, const Shape& shape, int64_t apart, int64_t threads) {
  Matrix other(random, {3, 5, 4, 5}, 1), matrix(random, shape, apart);
  const Samples both[] = {other.samples(), matrix.samples()};
  const std::string name = std::to_string(shape.rows) + "x" + std::to_string(shape.columns) + " of " +
                           std::to_string(shape.size) + ", " + std::to_string(shape.width) + " a row, " +
                           std::to_string(threads) + " threads";
  report->that(name + ": unchanged", same_samples(both, 2, threads));
  std::vector<bool> rows(shape.rows), columns(shape.columns);
  bool is_right = true;
  for (int64_t i = 0; i < shape.rows; ++i) {
    for (int64_t j = 0; j < shape.columns; ++j) {
      const bool is_sampled = j >= matrix.first(i) && j < matrix.first(i) + shape.width;
      if (is_sampled) rows[i] = columns[j] = true;
      if (!is_sampled && random->below(64) != 0) continue;
      unsigned char* const byte = matrix.at(i, j) + random->below(shape.size);
      const unsigned char bit = static_cast<unsigned char>(1 << random->below(8));
      *byte ^= bit;
      is_right = is_right && same_samples(both, 2, threads) != is_sampled;
      *byte ^= bit;
    }
  }
  report->that(name + ": a bit changed", is_right);
  report->that(name + ": no row is left out", std::find(rows.begin(), rows.end(), false) == rows.end());
  report->that(name + ": no column is left out", std::find(columns.begin(), columns.end(), false) == columns.end());
}

}  // namespace

int main() {
  Report report;
  Random random(7);
  for (const int64_t size : {1, 2, 4, 8}) {
    for (const Shape& shape :
         {Shape{1, 37, size, 37}, Shape{37, 1, size, 1}, Shape{3, 100, size, 34}, Shape{100, 3, size, 1},
          Shape{40, 160, size, 4}, Shape{33, 65, size, 2}, Shape{48, 48, size, 1}, Shape{9, 7, size, 7}}) {
      for (const int64_t apart : {1, 3}) check(&report, &random, shape, apart, 1);
    }
  }
  check(&report, &random, {2500, 11, 4, 1}, 1, 2);
  report.that("nothing", same_samples(nullptr, 0, 1));
  return report.finish("test_samples");
}
