import assert from "node:assert/strict";
import { ToolCallParser } from "./tool_calls.ts";
import type { ToolCall } from "./tool_calls.ts";

/** The answer in pieces of `size` characters; how it is cut must not matter. */
function parse(answer: string, size: number): { text: string; calls: ToolCall[] } {
  const parser = new ToolCallParser(["depth", "now"]);
  const pieces = [];
  for (let at = 0; at < answer.length; at += size) pieces.push(parser.push(answer.slice(at, at + size)));
  pieces.push(parser.flush());
  return { text: pieces.map((p) => p.text).join(""), calls: pieces.flatMap((p) => p.calls) };
}

const depth = { name: "depth", arguments: '{"place":"Orford"}' };
const now = { name: "now", arguments: "{}" };
const CASES: [string, string, string, ToolCall[]][] = [
  ["plain text", "The river [is] <deep>; it is {so}. ", "The river [is] <deep>; it is {so}.", []],
  ["Hermes", '<tool_call>\n{"name": "depth", "arguments": {"place": "Orford"}}\n</tool_call>', "", [depth]],
  [
    "Hermes, with text and twice",
    'Let me see.\n<tool_call>{"arguments": {"place": "Orford"}, "name": "depth"}</tool_call>\n<tool_call>\n{"name": "now"}\n</tool_call>\nDone.',
    "Let me see.Done.",
    [depth, now],
  ],
  ["Hermes, unclosed", '<tool_call>{"name": "now", "arguments": {}}', "", [now]],
  ["Hermes, no JSON", "<tool_call>now()</tool_call>!", "<tool_call>now()</tool_call>!", []],
  ["Hermes, cut short", 'Well <tool_call>{"name": "no', 'Well<tool_call>{"name": "no', []],
  [
    "Mistral, a list",
    '[TOOL_CALLS][{"name": "depth", "arguments": {"place": "Orford"}}, {"name": "now", "arguments": {}}]',
    "",
    [
      depth,
      now,
    ],
  ],
  ["Mistral, named", 'Hm. [TOOL_CALLS]depth[ARGS]{"place": "Orford"}[TOOL_CALLS]now[CALL_ID]abc123DEF[ARGS]{}', "Hm.", [
    depth,
    now,
  ]],
  ["Llama", '{"name": "depth", "parameters": {"place": "Orford"}}', "", [depth]],
  [
    "Llama, several",
    '<|python_tag|>{"name": "depth", "parameters": {"place": "Orford"}}; {"name": "now", "parameters": {}}',
    "",
    [
      depth,
      now,
    ],
  ],
  ["Llama, no tool of ours", '{"name": "Otto", "parameters": {}}', '{"name": "Otto", "parameters": {}}', []],
  ["an object as the answer", '{"otters": 3}', '{"otters": 3}', []],
  ["code in the middle", 'Use {"name": "now"}', 'Use {"name": "now"}', []],
];

for (const [name, answer, text, calls] of CASES) {
  Deno.test(`ToolCallParser: ${name}, however it is cut`, () => {
    for (const size of [1, 2, 3, 7, 1000]) assert.deepEqual(parse(answer, size), { text, calls }, `by ${size}`);
  });
}
