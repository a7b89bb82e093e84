// Element types of the kernels, without torch: what a tensor may hold, what it is accumulated in.
#pragma once
#include <cstdint>
#include <cstring>

namespace terrazzo {

// bfloat16 and IEEE half as their bits; arithmetic happens in float.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

enum class DType : int32_t { f32, f64, bf16, f16 };

template <class T> struct acc_type { using type = float; };
template <> struct acc_type<double> { using type = double; };
// What elements of type T are accumulated in: float, or double for double.
template <class T> using acc_t = typename acc_type<T>::type;

template <class T> struct dtype_of;
template <> struct dtype_of<float> { static constexpr DType value = DType::f32; };
template <> struct dtype_of<double> { static constexpr DType value = DType::f64; };
template <> struct dtype_of<bf16> { static constexpr DType value = DType::bf16; };
template <> struct dtype_of<f16> { static constexpr DType value = DType::f16; };

}  // namespace terrazzo
