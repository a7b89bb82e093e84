// Rows in groups, and which tile of them a block has: where the groups end is known on the device only.
#pragma once
#include "tile.cuh"

namespace terrazzo { namespace cuda {

// Rows of group e; group E is the rest behind the last. Without offs one group has all rows. Ends out of range touch no memory but ours.
struct GroupRows {
  const int32_t* offs;  // [E] or null
  int E, T;
  TZ_DEVICE int end(int e) const {
    if (e < 0) return 0;
    if (e >= E || !offs) return T;
    return min(max(offs[e], 0), T);
  }
};

struct GroupTile {
  int e, row, end, column;  // group, first row, end of the group's rows, column of tiles
};

// The tiles of all groups, group by group, inside one in bands of kBand tile rows: tiles computed at the same time share operands in
// L2. Every warp finds its block's tile by itself, 32 groups at a time, from offsets that only the device knows; nothing is kept
// from tile to tile, for want of registers. `groups`: E, or E + 1 with the rest. False behind the last tile.
constexpr int kBand = 8;
template <int kBlockM> TZ_DEVICE bool find_tile(const GroupRows& rows, int groups, int columns, int64_t number, GroupTile& found) {
  int first = 0, before = 0, begin, end, up_to;  // 32 groups, tile rows before them; rows of the lane's group, tile rows up to it
  for (;; first += kWarp) {
    if (first >= groups) return false;
    const int e = first + lane_id();
    begin = rows.end(e - 1), end = max(begin, rows.end(e));
    up_to = e < groups ? ceil_div(end - begin, kBlockM) : 0;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int other = __shfl_up_sync(kAllLanes, up_to, lanes);
      if (lane_id() >= lanes) up_to += other;
    }
    up_to += before;
    const int behind = __shfl_sync(kAllLanes, up_to, kWarp - 1);
    if (number < int64_t{behind} * columns) break;
    before = behind;
  }
  const int lane = __popc(__ballot_sync(kAllLanes, int64_t{up_to} * columns <= number));
  found.e = first + lane, found.row = __shfl_sync(kAllLanes, begin, lane), found.end = __shfl_sync(kAllLanes, end, lane);
  const int group_tiles = ceil_div(found.end - found.row, kBlockM);
  const int64_t inside = number - int64_t{__shfl_sync(kAllLanes, up_to, lane) - group_tiles} * columns;
  const int band = static_cast<int>(inside / (int64_t{kBand} * columns)) * kBand, band_rows = min(group_tiles - band, kBand);
  const int64_t in_band = inside - int64_t{band} * columns;
  found.row += (band + static_cast<int>(in_band % band_rows)) * kBlockM, found.column = static_cast<int>(in_band / band_rows);
  return true;
}

constexpr int64_t kMostRows = INT32_MAX - 256;  // a tile's last row is still an int

}}  // namespace terrazzo::cuda
