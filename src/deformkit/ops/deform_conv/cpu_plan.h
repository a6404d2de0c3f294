// The order in which the channels and taps of a slice are sampled and multiplied, computed once for a call.
#pragma once

#include "cpu/gemm.h"
#include "deform_conv/cpu_problem.h"

namespace deformkit::conv {

// Positions of a unit that are sampled and multiplied together.
struct Block {
  int64_t begin, points;
};

// A unit in blocks of about the same size, of which each starts with a whole vector: as few as have at most `most`
// positions, or with `even` an even number. `most` is a number of whole vectors, or of all positions. Convolutions of
// maps a bit larger than one block took 0.65 to 0.75 of the time that they take when the last block has the rest, of
// others 0.98 to 1.02: `deformkit bench --op deform_conv2d --shape 1x256x14x14` measures it.
template <typename A, int N>
std::vector<Block> cut_into_blocks(const Unit<N>& unit, int64_t most, bool even) {
  const int64_t points = unit.end - unit.begin;
  int64_t count = ceil_div(points, most);
  if (even) count += count % 2;
  std::vector<Block> blocks;
  for (int64_t i = 0, begin = 0, end; i < count; ++i, begin = end) {
    end = std::min(points, whole_vectors<A>(points * (i + 1) / count));
    if (begin < end) blocks.push_back({unit.begin + begin, end - begin});
  }
  return blocks;
}

// The samples of one tap for channels with the same offsets in the same group; `column` is where they stand among the
// columns of their chunk. The first and the last of the slice's with their offset group and tap are marked.
struct Segment {
  int64_t tap, offset_group, begin, channels, column;
  size_t product;
  bool first, last;
};

// Columns of one group that are multiplied at once.
struct Product {
  int64_t group, column, depth;
};

// A unit of work: the segments [first, last) are sampled, and then its products are computed.
struct Chunk {
  size_t first_segment, last_segment, first_product, last_product;
  int64_t width;
};

// The channels [begin, end), in chunks of at most `deepest` columns. When groups are narrow there are no products, and
// every chunk is one segment.
template <int N>
struct Plan {
  int64_t begin, end, widest = 0;
  // Each is laid out by itself: what the points of an offset group read stays close together, and in more of a cache's
  // sets than one that skips the channels of the other groups.
  std::vector<Piece> pieces;
  std::vector<Segment> segments;
  std::vector<Product> products;
  std::vector<Chunk> chunks;

  Plan(const Problem<N>& problem_, int64_t begin_, int64_t end_, int64_t deepest)
      : begin(begin_), end(end_), pieces(problem_.pieces(begin_, end_)), problem(problem_) {
    const int64_t per_offset = problem.channels_per_offset_group();
    for (int64_t group = begin / per_offset; group * per_offset < end; ++group) {
      const int64_t low = std::max(begin, group * per_offset), high = std::min(end, (group + 1) * per_offset);
      const int64_t width = problem.is_narrow() ? high - low : std::min(high - low, deepest);
      const int64_t together = problem.is_narrow() ? 1 : std::clamp<int64_t>(deepest / width, 1, problem.taps);
      for (int64_t tap = 0; tap < problem.taps; tap += together)
        for (int64_t c = low; c < high; c += width)
          add(group, tap, std::min(tap + together, problem.taps), c, std::min(c + width, high), low, high, deepest);
    }
    close();
  }

  int64_t channels() const { return end - begin; }
  const Piece& piece_of(const Segment& segment) const { return pieces[segment.offset_group - first_offset_group()]; }
  int64_t first_group() const { return begin / problem.group_channels; }
  int64_t groups() const { return ceil_div(end, problem.group_channels) - first_group(); }
  int64_t first_offset_group() const { return begin / problem.channels_per_offset_group(); }
  // Whether no earlier slice has channels of a group: what is computed of those that several have adds up.
  bool starts_group(int64_t group) const { return group * problem.group_channels >= begin; }
  bool starts_offset_group(int64_t group) const { return group * problem.channels_per_offset_group() >= begin; }

 private:
  void add(int64_t offset_group, int64_t tap, int64_t last_tap, int64_t begin, int64_t end, int64_t low, int64_t high,
           int64_t deepest) {
    const int64_t taps = last_tap - tap, per_group = problem.group_channels;
    if (width_ > 0 && (problem.is_narrow() || width_ + taps * (end - begin) > deepest)) close();
    const int64_t start = width_;
    size_t product = products.size();
    for (int64_t c = begin, next; c < end && !problem.is_narrow(); c = next) {
      next = std::min(end, (c / per_group + 1) * per_group);
      const int64_t depth = taps * (next - c);
      if (c == begin && product > first_product_ && products.back().group == c / per_group) {
        // The columns that the group already has in this chunk end where this one begins.
        products.back().depth += depth, --product;
      } else {
        products.push_back({c / per_group, start + taps * (c - begin), depth});
      }
    }
    for (int64_t t = tap; t < last_tap; ++t) {
      size_t own = product;
      for (int64_t c = begin, next; c < end; c = next, ++own) {
        next = problem.is_narrow() ? end : std::min(end, (c / per_group + 1) * per_group);
        segments.push_back({t, offset_group, c, next - c, start + taps * (c - begin) + (t - tap) * (next - c), own,
                            c == low, next == high});
      }
    }
    width_ += taps * (end - begin);
  }

  void close() {
    chunks.push_back({first_segment_, segments.size(), first_product_, products.size(), width_});
    first_segment_ = segments.size(), first_product_ = products.size();
    widest = std::max(widest, width_), width_ = 0;
  }

  const Problem<N>& problem;
  size_t first_segment_ = 0, first_product_ = 0;
  int64_t width_ = 0;
};

}  // namespace deformkit::conv
