/** Weights could not be had over the bus. The message says what to do. */
export class WeightsError extends Error {
  override readonly name = "WeightsError";
}
