// The rules there are, by the number that a launch table has of its own.
#pragma once

#include "adamw.h"
#include "avgrad.h"
#include "mada.h"
#include "online.h"

namespace metaadamw {

// The operands of a row: those of the rule and, last, the low-precision parameter.
template <class R>
constexpr int kOperandsOf = R::kOperands + 1;

// Whether two operands of the rule change roles from update to update.
template <class R>
constexpr bool kExchanges = R::kExchanged[0] != R::kExchanged[1];

// The numbers are also known to metaadamw_fast/launch.py.
template <class R>
constexpr int rule_number = -1;
template <>
inline constexpr int rule_number<AdamW> = 0;
template <>
inline constexpr int rule_number<AVGrad> = 1;
template <>
inline constexpr int rule_number<Mada> = 2;
template <>
inline constexpr int rule_number<OnlineAdamW> = 3;

// f(a rule) of the rule with this number.
template <typename F>
auto with_rule(int number, const F& f) {
  switch (number) {
    case rule_number<AVGrad>:
      return f(AVGrad());
    case rule_number<Mada>:
      return f(Mada());
    case rule_number<OnlineAdamW>:
      return f(OnlineAdamW());
    default:
      return f(AdamW());
  }
}

}  // namespace metaadamw
