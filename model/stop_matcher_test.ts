import assert from "node:assert/strict";
import { StopMatcher } from "./stop_matcher.ts";

/** Pushes all pieces: what came out, and the stop string found. */
function match(stops: string[], pieces: string[]): { out: string[]; stop?: string | undefined } {
  const matcher = new StopMatcher(stops);
  const out: string[] = [];
  let stop: string | undefined;
  for (const piece of pieces) {
    const found = matcher.push(piece);
    out.push(found.text);
    stop ??= found.stop;
  }
  out.push(matcher.flush());
  return { out, stop };
}

Deno.test("StopMatcher: finds a stop string within a piece and across pieces; nothing of it comes out", () => {
  assert.deepEqual(match(["END"], ["a END b"]), { out: ["a ", ""], stop: "END" });
  assert.deepEqual(match(["END"], ["a E", "N", "D b"]), { out: ["a ", "", "", ""], stop: "END" });
  assert.deepEqual(match(["\n\n"], ["x\n", "\ny"]), { out: ["x", "", ""], stop: "\n\n" });
});

Deno.test("StopMatcher: what only might have begun a stop string comes out when it does not go on, or at the end", () => {
  assert.deepEqual(match(["END"], ["a E", "Nd"]), { out: ["a ", "ENd", ""], stop: undefined });
  assert.deepEqual(match(["END"], ["a EN"]), { out: ["a ", "EN"], stop: undefined });
  assert.deepEqual(match(["aab"], ["a", "a", "a", "b"]), { out: ["", "", "a", "", ""], stop: "aab" });
});

Deno.test("StopMatcher: the first of several wins, whatever their order; nothing follows it", () => {
  assert.deepEqual(match(["world", "wo"], ["hello world"]), { out: ["hello ", ""], stop: "world" });
  assert.deepEqual(match(["b", "a"], ["xab"]), { out: ["x", ""], stop: "a" });
  assert.deepEqual(match(["x"], ["1x2", "3x4"]), { out: ["1", "", ""], stop: "x" });
});

Deno.test("StopMatcher: characters outside the basic plane, and no stop strings at all", () => {
  assert.deepEqual(match(["🦦!"], ["a🦦", "?🦦!b"]), { out: ["a", "🦦?", ""], stop: "🦦!" });
  assert.deepEqual(match([], ["any", "thing"]), { out: ["any", "thing", ""], stop: undefined });
  assert.deepEqual(match([""], ["any"]), { out: ["any", ""], stop: undefined });
});
