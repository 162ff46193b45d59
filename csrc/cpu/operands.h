// Operands of the matrix products. In the accumulator type x enters less its offset, everything as it was
// computed, and one packed form serves products over features and over positions. As pairs of bfloat16 x and
// W enter as they are, and whatever was computed (weights, dU, dS) is rounded on its way in; what rounding
// takes from a sum over x = offset + d is put back for the offset, which can be much larger than d:
//     sum_l c_l x_l = sum_l round(c_l) x_l + (sum_l (c_l - round(c_l)) offset_l) 1 + O(eps d)
// Included inside an anonymous namespace.

template <typename A, typename O>
constexpr int64_t kPanelOperands = kPanel<A> / kSummands<O>;  // of a row of a panel, summed over features

template <typename O>
inline int64_t summed(int64_t count) {  // operands of a sum over `count` numbers
  return (count + kSummands<O> - 1) / kSummands<O>;
}

#if defined(FASTAC_BFLOAT16_DOT)
constexpr int64_t kPairLanes = 2 * kLanes<float>;  // bfloat16 numbers of a vector

// The first `count` of kPairLanes numbers, zeros after them.
inline Vec<Pair> load_pairs(const BFloat16* p, int64_t count) {
  if (count >= kPairLanes) return load_vector(reinterpret_cast<const Pair*>(p));
  if (count <= 0) return Vec<Pair>{};
  return (Vec<Pair>)_mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), p);
}

// Numbers i of a and of b become pair i: of the first half of both, and of the second.
inline __attribute__((always_inline)) void interleave(Vec<Pair> a, Vec<Pair> b, Vec<Pair>& low,
                                                      Vec<Pair>& high) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                         38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  low = (Vec<Pair>)_mm512_permutex2var_epi16((__m512i)a, first, (__m512i)b);
  high = (Vec<Pair>)_mm512_permutex2var_epi16((__m512i)a, second, (__m512i)b);
}

// Pairs of neighbours: low[0], low[1]; low[2], low[3]; ... high[14], high[15].
inline __attribute__((always_inline)) Vec<Pair> round_along(Vec<float> low, Vec<float> high) {
  return (Vec<Pair>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// Pairs of lanes: first[i], second[i].
inline __attribute__((always_inline)) Vec<Pair> round_across(Vec<float> first, Vec<float> second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec<Pair>)_mm512_permutexvar_epi16(order, (__m512i)round_along(first, second));
}

inline __attribute__((always_inline)) Vec<float> first_of(Vec<Pair> pairs) {
  return (Vec<float>)(pairs << 16);
}
inline __attribute__((always_inline)) Vec<float> second_of(Vec<Pair> pairs) {
  return (Vec<float>)(pairs & Pair(0xffff0000));
}

inline Vec<Pair> pair_of_ones() {
  return broadcast<Pair>(0x3f803f80);
}

// x[begin + r] for r < count as pairs of features, features[p][r][:], as pairs of positions,
// positions[p][r / 2][:], or both; null for what is not wanted. offset[r] is the mean of row r, 0 if that is
// not finite.
inline void pack_rows(const RowSource<BFloat16>& source, int64_t begin, int64_t count, int64_t features,
                      Pair* by_feature, Pair* by_position, float* offset) {
  constexpr int64_t kRow = kPanelOperands<float, Pair>, kWide = kPanel<float>;
  const int64_t panels = panel_count<float>(features), pairs = summed<Pair>(count), last = begin + count - 1;
  const Vec<Pair> ones = pair_of_ones();
  for (int64_t r = 0; r < count; r += 2) {
    const bool both = r + 1 < count;
    const BFloat16* row[2] = {source.row(begin + r), source.row(std::min(begin + r + 1, last))};
    const BFloat16* ahead[2] = {source.row(std::min(begin + r + kRowsAhead, last)),
                                source.row(std::min(begin + r + 1 + kRowsAhead, last))};
    Vec<float> sum[2] = {};
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t m = p * kWide, left = features - m;
      const Vec<Pair> first = load_pairs(row[0] + m, left),
                      second = both ? load_pairs(row[1] + m, left) : Vec<Pair>{};
      FASTAC_EACH (i, 2) __builtin_prefetch(ahead[i] + m, 0, 2);
      sum[0] = multiply_add<float, Pair>(sum[0], first, ones);
      sum[1] = multiply_add<float, Pair>(sum[1], second, ones);
      if (by_feature != nullptr) {
        Pair* out = by_feature + (p * count + r) * kRow;
        store_vector(out, first);
        if (both) store_vector(out + kRow, second);
      }
      if (by_position != nullptr) {
        Vec<Pair> low, high;
        interleave(first, second, low, high);
        Pair* out = by_position + (p * pairs + r / 2) * kWide;
        store_vector(out, low);
        store_vector(out + kLanes<Pair>, high);
      }
    }
    float total[2];
    fold_all<float, 2>(sum, total);
    for (int64_t i = 0; i < (both ? 2 : 1); ++i) {
      const float mean = total[i] / float(features);
      offset[r + i] = std::isfinite(mean) ? mean : 0.0f;
    }
  }
}

// One panel of `count` rows, pairs of features, as pairs of rows: out[r / 2][:].
inline void pair_rows(const Pair* rows, int64_t count, Pair* out) {
  constexpr int64_t kRow = kPanelOperands<float, Pair>;
  for (int64_t r = 0; r < count; r += 2, rows += 2 * kRow, out += 2 * kRow) {
    Vec<Pair> low, high;
    interleave(load_vector(rows), r + 1 < count ? load_vector(rows + kRow) : Vec<Pair>{}, low, high);
    store_vector(out, low);
    store_vector(out + kLanes<Pair>, high);
  }
}

// The same from rows of user memory that are `features` apart.
inline void pair_rows(const BFloat16* rows, int64_t count, int64_t features, int64_t panel, Pair* out) {
  const int64_t m = panel * kPanel<float>;
  for (int64_t r = 0; r < count; r += 2, rows += 2 * features, out += kPanel<float>) {
    Vec<Pair> low, high;
    interleave(load_pairs(rows + m, features - m),
               r + 1 < count ? load_pairs(rows + features + m, features - m) : Vec<Pair>{}, low, high);
    store_vector(out, low);
    store_vector(out + kLanes<Pair>, high);
  }
}

// weight, one vector of units, transposed: out[m / 2][lane], zero outside.
inline void pack_transposed(const BFloat16* weight, int64_t units, int64_t features, int64_t first,
                            Pair* out) {
  constexpr int64_t kBlock = kLanes<Pair>;
  const int64_t padded = panel_count<float>(features) * kPanel<float>,
                valid = std::min(kBlock, units - first);
  for (int64_t m = 0; m < padded; m += kPairLanes, out += kBlock * kBlock) {
    Vec<Pair> block[kBlock];
    FASTAC_EACH (i, kBlock)
      block[i] = i < valid ? load_pairs(weight + (first + i) * features + m, features - m) : Vec<Pair>{};
    transpose_block<Pair>(block);
    FASTAC_EACH (i, kBlock) store_vector(out + i * kBlock, block[i]);
  }
}

// out[r / 2][n] = scale[n] c[r][n] rounded, rest[n] = sum_r (scale[n] c[r][n] - rounded) offset[r], for the
// units of `vectors` vectors. Without `scale` it is 1.
inline void pair_positions(const float* c, int64_t stride, int64_t rows, int64_t vectors, const float* scale,
                           const float* offset, Pair* out, float* rest) {
  for (int64_t n = 0; n < vectors * kLanes<float>; n += kLanes<float>) {
    const Vec<float> factor = scale != nullptr ? load_vector(scale + n) : broadcast(1.0f);
    Vec<float> left = {};
    for (int64_t r = 0; r < rows; r += 2) {
      const bool both = r + 1 < rows;
      const Vec<float> first = load_vector(c + r * stride + n) * factor,
                       second = both ? load_vector(c + (r + 1) * stride + n) * factor : Vec<float>{};
      const Vec<Pair> rounded = round_across(first, second);
      left += (first - first_of(rounded)) * offset[r];
      if (both) left += (second - second_of(rounded)) * offset[r + 1];
      store_vector(out + r / 2 * stride + n, rounded);
    }
    store_vector(rest + n, left);
  }
}

// out[n / 2][r] = c[r][n] rounded, for r < rows and n < units; out_stride and stride are multiples of the
// lanes.
inline void pair_units(const float* c, int64_t stride, int64_t rows, int64_t units, Pair* out,
                       int64_t out_stride) {
  constexpr int64_t kBlock = kLanes<Pair>;
  for (int64_t r = 0; r < rows; r += kBlock)
    for (int64_t n = 0; n < units; n += kPairLanes) {
      Vec<Pair> block[kBlock];
      FASTAC_EACH (i, kBlock) {
        const float* from = c + (r + i) * stride + n;
        block[i] = r + i >= rows
                       ? Vec<Pair>{}
                       : round_along(load_vector(from),
                                     n + kBlock < stride ? load_vector(from + kBlock) : Vec<float>{});
      }
      transpose_block<Pair>(block);
      FASTAC_EACH (i, kBlock)
        if (n + 2 * i < units) store_vector(out + (n / 2 + i) * out_stride + r, block[i]);
    }
}
#endif
