/**
 * One device. A {@linkcode Worker} announces itself on the bus, opens the shards that it is told to hold, and computes
 * micro-batches in the order they arrive: bus → queue → one call of the kernel library → bus.
 *
 * Only `kernel_library.ts` opens the kernel library; everything else sees the interfaces in `kernels.ts`. Nothing here
 * knows HTTP, requests, or what other workers hold. Weights and KV cache stay in the library's memory.
 *
 * @module
 */
export * from "./errors.ts";
export * from "./health.ts";
export * from "./kernel_library.ts";
export * from "./kernels.ts";
export * from "./worker.ts";
