// Joins the chunks of decode_attention and applies the gate; a thread per element, D a multiple of 32.
//
// best, total: float [HQ, chunks]; sums: float [HQ, chunks, D]; gate: [HQ, D]; sizes: int [4], the last is chunks
// y: T [HQ, D]
const uint lane = thread_index_in_simdgroup;
const uint element = thread_position_in_grid.x;
if (element >= uint(HQ * D)) {
  return;
}
const uint chunks = uint(sizes[3]);
const uint first = element / D * chunks;  // of the head's chunks

float maximum = -INFINITY;
for (uint chunk = lane; chunk < chunks; chunk += 32) {
  maximum = metal::max(maximum, best[first + chunk]);
}
maximum = simd_max(maximum);
float denominator = 0.0f;
for (uint chunk = lane; chunk < chunks; chunk += 32) {
  denominator = metal::fma(total[first + chunk], metal::exp(best[first + chunk] - maximum), denominator);
}
denominator = simd_sum(denominator);
float sum = 0.0f;
for (uint chunk = 0; chunk < chunks; chunk++) {
  sum = metal::fma(sums[(first + chunk) * D + element % D], metal::exp(best[first + chunk] - maximum), sum);
}
y[element] = static_cast<T>(sum / denominator / (1.0f + metal::exp(-float(gate[element]))));
