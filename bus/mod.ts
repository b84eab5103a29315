/**
 * The bus: the only way between orchestrator and workers, on one machine too.
 *
 * Here live the {@linkcode Bus} interface with its two transports, in-process and NATS, the binary form of what travels on it every
 * token (`wire.ts`, `batch.ts`) and the JSON form of what travels rarely (`control.ts`, `shard.ts`). Nothing here knows models,
 * kernels or HTTP. Bytes come in from publishers, are copied, and go to subscribers; everything that is decoded is
 * validated first, since a message may come from a broken or foreign peer.
 *
 * @module
 */
export * from "./batch.ts";
export * from "./bus.ts";
export * from "./cluster_store.ts";
export * from "./control.ts";
export * from "./errors.ts";
export * from "./in_process.ts";
export * from "./nats.ts";
export * from "./nats_server.ts";
export * from "./probe.ts";
export * from "./shard.ts";
export * from "./subject.ts";
export * from "./version.ts";
export * from "./wire.ts";
