/**
 * What turns requests into tokens: it finds the workers on the bus ({@linkcode Membership}), decides who holds which layers
 * ({@linkcode placeReplicas}), has them load their shards and runs micro-batches through them ({@linkcode Pipeline}), replaces what is
 * lost ({@linkcode Deployment}), puts micro-batches together from all requests of a replica ({@linkcode Scheduler}), brings requests
 * to replicas ({@linkcode Fleet}), and gives the answers ({@linkcode Engine}).
 *
 * A sequence is its token ids: whatever the workers hold of it can be computed anew. Nothing here knows kernels or tensors;
 * requests come from `api/`, `cli/` or a program, and leave as messages on the bus.
 *
 * @module
 */
export * from "./deployment.ts";
export * from "./engine.ts";
export * from "./errors.ts";
export * from "./fleet.ts";
export * from "./membership.ts";
export * from "./pipeline.ts";
export * from "./placement.ts";
export * from "./replicas.ts";
export * from "./request.ts";
export * from "./scheduler.ts";
export * from "./served_model.ts";
export * from "./speed.ts";
export * from "./telemetry.ts";
