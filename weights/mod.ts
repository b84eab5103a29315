/**
 * Weights over the bus: a device gets the parts of a model's files that hold its layers, and no more.
 *
 * Files are cut into chunks of 256 KiB, and the model's {@linkcode Manifest} tells the SHA-256 of each; a hash over these is its address.
 * Whoever has chunks of it, the orchestrator or another worker, is a {@linkcode WeightSource}; a {@linkcode WeightStore} fetches
 * those that its device lacks, checks them, and writes them at their place into files with holes, from which the kernel
 * library loads as from whole ones. What a transfer that was cut has left is found again by its hashes.
 *
 * Nothing here knows what the bytes mean. Data comes from the bus and from disk, is checked against hashes, and goes to disk and the bus.
 *
 * @module
 */
export * from "./chunk_files.ts";
export * from "./errors.ts";
export * from "./fetch.ts";
export * from "./manifest.ts";
export * from "./manifest_cache.ts";
export * from "./source.ts";
export * from "./store.ts";
