/**
 * Lutra runs a low-bit language model on the boards you own.
 *
 * As a program: `deno run -q -P=run mod.ts run MODEL.gguf "Once upon a time"`. As a library:
 *
 * @example
 * ```ts ignore
 * import { startLocalCluster } from "./mod.ts";
 *
 * await using cluster = await startLocalCluster("models/lutra-books-6M-TQ2_0.gguf");
 * const { engine } = cluster;
 * const promptTokens = engine.model.tokenizer.encode("Once upon a time");
 * for await (const event of engine.generate({ promptTokens, maxTokens: 100 })) {
 *   if (event.type === "token") console.log(event.text);
 * }
 * ```
 *
 * @module
 */
export { InProcessBus } from "./bus/mod.ts";
export type { Bus, BusMessage, Subscription } from "./bus/mod.ts";
export { startLocalCluster } from "./cli/local_cluster.ts";
export type { LocalCluster, LocalClusterOptions } from "./cli/local_cluster.ts";
export * from "./model/mod.ts";
export { createApp } from "./orchestrator/api/mod.ts";
export * from "./orchestrator/mod.ts";
export { loadKernels, Worker } from "./worker/mod.ts";
export type { WorkerOptions } from "./worker/mod.ts";

if (import.meta.main) {
  const { main } = await import("./cli/main.ts");
  Deno.exit(await main(Deno.args));
}
