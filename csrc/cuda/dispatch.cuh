// From a plan to kernels: what the files forward_<dtype>.cu, backward_<dtype>.cu and reduce_<dtype>.cu share.
#pragma once

#include "kernels.h"
#include "launch.cuh"

#include <stdexcept>
#include <type_traits>
#include <utility>

namespace fastac::cuda {

template <int BL, int BN>
struct Compiled {
  static constexpr int kPositions = BL, kUnits = BN;
};

// Calls use(Compiled<BL, BN>) for the tile of the list that is asked for.
template <const auto& TILES, class Use, size_t... I>
void with_tile(const Tile& tile, Use use, std::index_sequence<I...>) {
  const auto is = [&](const auto& candidate, auto compiled) {
    if (!(candidate == tile)) return false;
    use(compiled);
    return true;
  };
  if (!(is(TILES[I], Compiled<TILES[I].block_l, TILES[I].block_n>{}) || ...))
    throw std::logic_error("fastac: this tile is not compiled");
}
template <const auto& TILES, class Use>
void with_tile(const Tile& tile, Use use) {
  with_tile<TILES>(tile, use,
                   std::make_index_sequence<std::extent_v<std::remove_reference_t<decltype(TILES)>>>());
}

}  // namespace fastac::cuda
