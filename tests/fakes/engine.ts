/**
 * An engine's process without an engine, for tests of what speaks with one. `deno run tests/fakes/engine.ts MODE`:
 *
 * - `steady`: steps of 2 ms, logits that rise;
 * - `contrary`: the same with logits that fall;
 * - `refuse`, `babble`, `crash`: an error, no JSON, or an end at the first measurement.
 *
 * @module
 */
import { serve } from "../../bench/engines/engine.ts";
import type { Engine } from "../../bench/engines/engine.ts";

const mode = Deno.args[0] ?? "steady";
const logits = Array.from({ length: 16 }, (_, i) => mode === "contrary" ? -i : i);

const engine: Engine = {
  load: () => ({ name: "fake", build: mode, bytesPerStep: 1e6 }),
  measure: ({ steps }) => {
    if (mode === "refuse") throw new Error("no room for the sequences");
    if (mode === "babble") console.log("hello");
    if (mode === "crash") Deno.exit(3);
    return new Array(steps).fill(0.002);
  },
  logits: () => logits,
  bandwidth: () => Promise.resolve(10),
};
await serve(engine);
