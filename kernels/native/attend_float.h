// Attention over a float32 cache: plain loops that compilers vectorize well, included by every variant's source file
// inside its unnamed namespace. Blocks and online softmax are as over the int8 cache, in float throughout.

inline void attend_float(const Attend& a, const float* q, const float* keys, const float* values) {
  const int width = a.head_dim;
  for (int r = 0; r < a.rows; r++) {
    float *sum = a.sum + size_t(r) * a.padded, m = -__builtin_inff(), l = 0;
    for (int d = 0; d < a.padded; d++) sum[d] = 0;
    const int end = a.limit[r] < a.end ? a.limit[r] : a.end;
    for (int from = a.begin; from < end; from += kBlock) {
      const int n = end - from < kBlock ? end - from : kBlock;
      float scores[kBlock], top = -__builtin_inff();
      for (int j = 0; j < n; j++) {
        const float *key = keys + size_t(from + j) * width, *row = q + size_t(r) * width;
        float lanes[8] = {};  // partial sums, so that the loop has a vector's shape without reordering
        int d = 0;
        for (; d + 8 <= width; d += 8)
          for (int i = 0; i < 8; i++) lanes[i] += row[d + i] * key[d + i];
        for (; d < width; d++) lanes[d % 8] += row[d] * key[d];
        scores[j] = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5]) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]))) *
                    a.q_scale[r];
        top = scores[j] > top || scores[j] != scores[j] ? scores[j] : top;
      }
      const float next = top > m || top != top ? top : m, old = __builtin_exp2f(m - next);
      for (int d = 0; d < width; d++) sum[d] *= old;
      l *= old, m = next;
      for (int j = 0; j < n; j++) {
        const float p = __builtin_exp2f(scores[j] - next), *value = values + size_t(from + j) * width;
        l += p;
        for (int d = 0; d < width; d++) sum[d] += p * value[d];
      }
    }
    a.m[r] = m, a.l[r] = l;
  }
}
