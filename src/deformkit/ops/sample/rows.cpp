// How rows are read and written, compiled once for the operators that share it.
#include "sample/rows.h"

namespace deformkit {
namespace {

// Positions and channels that are turned at a time: as many channels as a register has lanes, whose lines stay in a
// core's first cache. `python benchmarks/run.py sample roi` measures other values.
constexpr int64_t tile = 256, tile_channels = register_bytes / 4;

// f(position, positions, channel, channels) for every tile.
template <typename F>
void for_tiles(int64_t positions, int64_t channels, F&& f) {
  for (int64_t p = 0; p < positions; p += tile)
    for (int64_t c = 0; c < channels; c += tile_channels)
      f(p, std::min(tile, positions - p), c, std::min(tile_channels, channels - c));
}

}  // namespace

template <typename A>
void read_rows(const Tensor& tensor, int64_t at, int64_t pitch, int64_t rows, int64_t width, A* values,
               int64_t own_pitch) {
  dispatch_dtype(tensor.scalar_type(), [&]<typename T>() {
    const T* source = static_cast<const T*>(tensor.data_ptr()) + at;
    for (int64_t r = 0; r < rows; ++r, source += pitch, values += own_pitch) {
      ask_for_row<false, true>(source + rows_ahead * pitch, width);
      load_run(source, width, values);
      std::fill(values + width, values + own_pitch, A(0));
    }
  });
}

template <typename A>
void write_rows(const Sink& out, int64_t at, int64_t pitch, const A* values, int64_t own_pitch, int64_t rows,
                int64_t width) {
  dispatch_dtype(out.dtype(), [&]<typename T>() {
    T* to = out.data<T>() + at;
    for (int64_t r = 0; r < rows; ++r, to += pitch, values += own_pitch) {
      ask_for_row<true>(to + written_ahead * pitch, width);
      store_run(values, width, to);
    }
  });
}

template <typename A>
void read_turned(const Map& field, int64_t batch, int64_t channel, int64_t channels, int64_t from, int64_t points,
                 A* rows) {
  if (channels == 1) return read_run(field, batch, channel, from, points, rows);
  if (field.channel_stride == 1) {
    dispatch_dtype(field.dtype(), [&]<typename T>() {
      for (int64_t p = 0; p < points; ++p)
        load_run(field.at<T>(batch, channel, from + p), channels, rows + p * channels);
    });
    return;
  }
  if (field.position_stride == 1) {
    dispatch_summed_as<A>(field.dtype(), [&]<typename T>() {
      for_tiles(points, channels, [&](int64_t p, int64_t some_points, int64_t c, int64_t some) {
        transpose<A>(field.at<T>(batch, channel + c, from + p), some, some_points, field.channel_stride,
                     rows + p * channels + c, channels);
      });
    });
    return;
  }
  A lines[tile_channels * tile];
  for_tiles(points, channels, [&](int64_t p, int64_t some_points, int64_t c, int64_t some) {
    for (int64_t i = 0; i < some; ++i) read_run(field, batch, channel + c + i, from + p, some_points, lines + i * tile);
    transpose<A>(lines, some, some_points, tile, rows + p * channels + c, channels);
  });
}

template <typename A>
void write_turned(const A* rows, int64_t pitch, int64_t points, int64_t channels, const Sink& out, int64_t at,
                  int64_t plane, bool add) {
  if (!add) {
    dispatch_summed_as<A>(out.dtype(), [&]<typename T>() {
      for_tiles(points, channels, [&](int64_t p, int64_t some_points, int64_t c, int64_t some) {
        transpose<A>(rows + p * pitch + c, some_points, some, pitch, out.data<T>() + at + c * plane + p, plane);
      });
    });
    return;
  }
  A lines[tile_channels * tile];
  for_tiles(points, channels, [&](int64_t p, int64_t some_points, int64_t c, int64_t some) {
    transpose<A>(rows + p * pitch + c, some_points, some, pitch, lines, tile);
    for (int64_t i = 0; i < some; ++i) out.write(at + (c + i) * plane + p, lines + i * tile, some_points, true);
  });
}

#define DEFORMKIT_INSTANTIATE(A)                                                                \
  template void read_rows(const Tensor&, int64_t, int64_t, int64_t, int64_t, A*, int64_t);      \
  template void write_rows(const Sink&, int64_t, int64_t, const A*, int64_t, int64_t, int64_t); \
  template void read_turned(const Map&, int64_t, int64_t, int64_t, int64_t, int64_t, A*);       \
  template void write_turned(const A*, int64_t, int64_t, int64_t, const Sink&, int64_t, int64_t, bool);
DEFORMKIT_INSTANTIATE(float)
DEFORMKIT_INSTANTIATE(double)

}  // namespace deformkit
