// Vectors of the instruction set a file is compiled for, and loads and stores that convert from the storage
// type. Included inside an anonymous namespace after the target pragma; FASTAC_VECTOR_BYTES says how wide a
// register is.

template <typename A>
struct VecType {
  typedef A type __attribute__((vector_size(FASTAC_VECTOR_BYTES)));
};
template <typename A>
using Vec = typename VecType<A>::type;
template <typename A>
constexpr int64_t kLanes = FASTAC_VECTOR_BYTES / sizeof(A);

// A storage type is a struct around its bits, so that no arithmetic happens on it by accident.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <typename A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

template <typename A>
inline Vec<A> load_vector(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename A>
inline void store_vector(A* p, Vec<A> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

typedef uint32_t VecU32 __attribute__((vector_size(FASTAC_VECTOR_BYTES)));
typedef int32_t VecI32 __attribute__((vector_size(FASTAC_VECTOR_BYTES)));
typedef uint16_t HalfVecU16 __attribute__((vector_size(FASTAC_VECTOR_BYTES / 2)));

inline VecU32 broadcast_u32(uint32_t value) {
  return value - VecU32{};
}

typedef uint16_t VecU16 __attribute__((vector_size(FASTAC_VECTOR_BYTES)));

inline __attribute__((always_inline)) VecU16 join(HalfVecU16 low, HalfVecU16 high) {
  VecU16 both;
  __builtin_memcpy(&both, &low, sizeof low);
  __builtin_memcpy(reinterpret_cast<char*>(&both) + sizeof low, &high, sizeof high);
  return both;
}

inline HalfVecU16 load_bits(const uint16_t* p) {
  HalfVecU16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<float> widen(HalfVecU16 bits, BFloat16) {
  return (Vec<float>)(__builtin_convertvector(bits, VecU32) << 16);
}

inline HalfVecU16 narrow(Vec<float> value, BFloat16) {
#if defined(FASTAC_BFLOAT16_ROUNDING)
  // The instruction takes subnormal numbers for zero; a vector that holds any goes the long way.
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)value, kSubnormal) == 0, 1))
    return (HalfVecU16)_mm512_cvtneps_pbh((__m512)value);
#endif
  VecU32 u = (VecU32)value;
  VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  VecU32 nan = (u >> 16) | 0x40u;
  VecI32 is_nan = value != value;
  return __builtin_convertvector(is_nan ? nan : rounded, HalfVecU16);
}

// binary16 by rescaling: the exponent fields differ by 112, and the product renormalises what was subnormal.
inline Vec<float> widen(HalfVecU16 bits, Float16) {
#if FASTAC_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#else
  VecU32 h = __builtin_convertvector(bits, VecU32);
  VecU32 magnitude = (h & 0x7fffu) << 13;
  Vec<float> value = (Vec<float>)magnitude * 0x1p112f;
  VecI32 special = (VecI32)(magnitude >= (0x7c00u << 13));
  VecU32 u = special ? (magnitude | 0x7f800000u) : (VecU32)value;
  return (Vec<float>)(u | ((h & 0x8000u) << 16));
#endif
}

inline HalfVecU16 narrow(Vec<float> value, Float16) {
#if FASTAC_VECTOR_BYTES == 64
  return (HalfVecU16)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
#else
  VecU32 u = (VecU32)value;
  VecU32 sign = (u >> 16) & 0x8000u;
  VecU32 magnitude = u & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the float adder do the rounding at 2^-24.
  VecU32 subnormal = (VecU32)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  VecU32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  VecU32 overflow = broadcast_u32(0x7c00u);
  VecI32 is_sub = (VecI32)(magnitude < (113u << 23));
  VecI32 is_over = (VecI32)(magnitude >= 0x477ff000u);  // 65520 rounds to infinity
  VecI32 is_nan = (VecI32)(magnitude > 0x7f800000u);
  VecU32 h = is_sub ? subnormal : normal;
  h = is_over ? overflow : h;
  h = is_nan ? broadcast_u32(0x7e00u) : h;
  return __builtin_convertvector(h | sign, HalfVecU16);
#endif
}

template <typename T>
struct Storage {  // float and double are their own accumulator
  static Vec<T> load(const T* p) { return load_vector(p); }
  static void store(T* p, Vec<T> v) { store_vector(p, v); }
};
template <typename Half>
struct HalfStorage {
  static Vec<float> load(const Half* p) { return widen(load_bits(&p->bits), Half{}); }
  static void store(Half* p, Vec<float> v) {
    HalfVecU16 bits = narrow(v, Half{});
    __builtin_memcpy(p, &bits, sizeof bits);
  }
};
template <>
struct Storage<BFloat16> : HalfStorage<BFloat16> {};
template <>
struct Storage<Float16> : HalfStorage<Float16> {};

// Stores past the caches, for results too large to stay there; to aligned memory, visible to others after
// stream_fence().
#if defined(__x86_64__)
inline void stream_bytes(void* p, const void* value, std::integral_constant<int, 16>) {
  __m128i v;
  __builtin_memcpy(&v, value, sizeof v);
  _mm_stream_si128(static_cast<__m128i*>(p), v);
}
#if FASTAC_VECTOR_BYTES >= 32
inline void stream_bytes(void* p, const void* value, std::integral_constant<int, 32>) {
  __m256i v;
  __builtin_memcpy(&v, value, sizeof v);
  _mm256_stream_si256(static_cast<__m256i*>(p), v);
}
#endif
#if FASTAC_VECTOR_BYTES >= 64
inline void stream_bytes(void* p, const void* value, std::integral_constant<int, 64>) {
  __m512i v;
  __builtin_memcpy(&v, value, sizeof v);
  _mm512_stream_si512(static_cast<__m512i*>(p), v);
}
#endif
inline void stream_fence() {
  _mm_sfence();
}
constexpr bool kCanStream = true;
#else
template <int Bytes>
inline void stream_bytes(void* p, const void* value, std::integral_constant<int, Bytes>) {
  __builtin_memcpy(p, value, Bytes);
}
inline void stream_fence() {}
constexpr bool kCanStream = false;
#endif

template <typename T>
inline void stream_vector(T* p, Vec<T> v) {
  stream_bytes(p, &v, std::integral_constant<int, FASTAC_VECTOR_BYTES>{});
}

// The first `count` <= kLanes elements; the rest of the vector is zero, respectively memory beyond is left
// alone. The last columns of every row come this way, so AVX-512 does it with a mask; elsewhere it goes
// through a buffer.
#if FASTAC_VECTOR_BYTES == 64
inline Vec<float> load_partial(const float* p, int64_t count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
inline Vec<double> load_partial(const double* p, int64_t count) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
}
template <typename Half>
inline Vec<float> load_partial(const Half* p, int64_t count) {
  return widen((HalfVecU16)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p), Half{});
}
inline void store_partial(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
}
inline void store_partial(double* p, Vec<double> v, int64_t count) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
}
template <typename Half>
inline void store_partial(Half* p, Vec<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)narrow(v, Half{}));
}
#else
template <typename T, typename A = typename Accumulator<T>::type>
inline Vec<A> load_partial(const T* p, int64_t count) {
  T buffer[kLanes<A>] = {};
  __builtin_memcpy(buffer, p, count * sizeof(T));
  return Storage<T>::load(buffer);
}
template <typename T, typename A = typename Accumulator<T>::type>
inline void store_partial(T* p, Vec<A> v, int64_t count) {
  T buffer[kLanes<A>];
  Storage<T>::store(buffer, v);
  __builtin_memcpy(p, buffer, count * sizeof(T));
}
#endif

template <typename A>
inline Vec<A> square_root(Vec<A> x) {
  Vec<A> root = {};
  for (int64_t i = 0; i < kLanes<A>; ++i) root[i] = std::sqrt(A(x[i]));
  return root;
}
#if FASTAC_VECTOR_BYTES == 64
template <>
inline Vec<float> square_root<float>(Vec<float> x) {
  return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
}
#endif

// e^x by Cody-Waite reduction and a Taylor polynomial; 0 below -87 (double: -708), NaN stays NaN.
inline __attribute__((always_inline)) Vec<float> exponential(Vec<float> x) {
#if FASTAC_VECTOR_BYTES == 64
  // The second operand is what comes out of a comparison with NaN.
  Vec<float> clamped = (Vec<float>)_mm512_maskz_max_ps(0xffff, (__m512)broadcast(-88.0f), (__m512)x);
#else
  Vec<float> clamped = x < -88.0f ? broadcast(-88.0f) : x;
#endif
  Vec<float> shifted = clamped * 1.44269504f + 0x1.8p23f;
  Vec<float> n = shifted - 0x1.8p23f;
  Vec<float> r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if FASTAC_VECTOR_BYTES == 64
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(-87.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  VecI32 exponent = __builtin_convertvector(n, VecI32) + 127;
  Vec<float> result = p * (Vec<float>)(exponent << 23);
  result = x < -87.0f ? Vec<float>{} : result;
  return x != x ? x : result;
#endif
}

typedef int64_t VecI64 __attribute__((vector_size(FASTAC_VECTOR_BYTES)));

inline __attribute__((always_inline)) Vec<double> exponential(Vec<double> x) {
  Vec<double> clamped = x < -709.0 ? broadcast(-709.0) : x;
  Vec<double> shifted = clamped * 1.4426950408889634 + 0x1.8p52;
  Vec<double> n = shifted - 0x1.8p52;
  Vec<double> r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  constexpr double kInverseFactorial[] = {1.0 / 6227020800.0,
                                          1.0 / 479001600,
                                          1.0 / 39916800,
                                          1.0 / 3628800,
                                          1.0 / 362880,
                                          1.0 / 40320,
                                          1.0 / 5040,
                                          1.0 / 720,
                                          1.0 / 120,
                                          1.0 / 24,
                                          1.0 / 6,
                                          0.5,
                                          1.0,
                                          1.0};
  Vec<double> p = broadcast(kInverseFactorial[0]);
  for (int i = 1; i < 14; ++i) p = p * r + kInverseFactorial[i];
  VecI64 exponent = (VecI64)shifted - (VecI64)broadcast(0x1.8p52) + 1023;
  Vec<double> result = p * (Vec<double>)(exponent << 52);
  result = x < -708.0 ? Vec<double>{} : result;
  return x != x ? x : result;
}
