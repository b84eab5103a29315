import assert from "node:assert/strict";
import { ChatTemplate } from "../../model/mod.ts";
import type { ChatTool } from "../../model/mod.ts";
import { shared } from "../../tests/data.ts";
import type { Engine } from "../engine.ts";
import type { GenerateEvent, GenerateRequest } from "../request.ts";
import { createApp } from "./mod.ts";

const TEMPLATE =
  "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}" +
  "{% for c in m.tool_calls or [] %}<call {{ c.id }} {{ c.function.name }} {{ c.function.arguments.place }}>{% endfor %}" +
  "{% if m.role == 'tool' %}<answer {{ m.tool_call_id }} {{ m.name }}>{% endif %}\n{% endfor %}";
const MARK = 1_000_000; // a special token's id

/** An app over a model that says `answer`, a character a token; `[TOOL_CALLS]` is a special token. Prompts come back as text. */
function scripted(answer: string, template: string | undefined = TEMPLATE) {
  const prompts: string[] = [];
  const pieces = [...answer.matchAll(/\[TOOL_CALLS\]|./gsu)].map(([piece]) => piece);
  const ids = pieces.map((piece) => piece === "[TOOL_CALLS]" ? MARK : piece.codePointAt(0)!);
  const engine = {
    model: {
      id: "scripted",
      chatTemplate: new ChatTemplate(template),
      tokenizer: {
        eosIds: new Set<number>(),
        encode: (text: string) => (prompts.push(text), [1]),
        tokenBytes: (id: number) => new TextEncoder().encode(id === MARK ? "" : String.fromCodePoint(id)),
        tokenText: (id: number) => id === MARK ? "[TOOL_CALLS]" : String.fromCodePoint(id),
      },
    },
    async *generate(_request: GenerateRequest): AsyncGenerator<GenerateEvent> {
      for (const id of ids) {
        yield await Promise.resolve({ type: "token", id, text: id === MARK ? "" : String.fromCodePoint(id) } as const);
      }
      yield { type: "done", reason: "stop", usage: { promptTokens: 1, completionTokens: ids.length } };
    },
  } as unknown as Engine;
  const app = createApp({ engine, onError: () => {} });
  const ask = async (body: object) =>
    await app.request("/v1/chat/completions", {
      method: "POST",
      body: JSON.stringify({ messages: [{ role: "user", content: "How deep?" }], ...body }),
      headers: { "content-type": "application/json" },
    });
  return { ask, prompts };
}

const tools = [{
  type: "function",
  function: { name: "depth", description: "How deep", parameters: { type: "object", properties: {} } },
}];
const HERMES = 'Let me look.\n<tool_call>\n{"name": "depth", "arguments": {"place": "Orford"}}\n</tool_call>';
const MISTRAL = 'Let me look.[TOOL_CALLS][{"name": "depth", "arguments": {"place": "Orford"}}]';

for (const [form, answer] of [["Hermes", HERMES], ["Mistral", MISTRAL]] as const) {
  Deno.test(`tools: a call in ${form}'s form becomes tool_calls, whole and streamed`, async () => {
    const { ask, prompts } = scripted(answer);
    const { choices: [whole] } = await (await ask({ tools, tool_choice: "auto" })).json();
    assert.match(prompts.at(-1)!, /^TOOLS \[\{"type": "function", "function": \{"name": "depth"/);
    assert.equal(whole.finish_reason, "tool_calls");
    assert.equal(whole.message.content, "Let me look.");
    const [call] = whole.message.tool_calls;
    assert.match(call.id, /^[a-z0-9]{9}$/);
    assert.deepEqual([call.type, call.function], ["function", { name: "depth", arguments: '{"place":"Orford"}' }]);

    const events = (await (await ask({ tools, stream: true })).text()).split("\n\n").filter((e) =>
      e.startsWith("data: {")
    );
    const parts = events.map((event) => JSON.parse(event.slice(6)).choices[0]);
    assert.equal(parts.map((part) => part.delta.content ?? "").join(""), "Let me look.");
    const calls = parts.flatMap((part) => part.delta.tool_calls ?? []);
    assert.deepEqual(calls.map((c) => [c.index, c.type, c.function]), [[0, "function", call.function]]);
    assert.equal(parts.at(-1).finish_reason, "tool_calls");
  });
}

Deno.test("tools: an answer without calls is text; tool_choice none offers none and looks for none", async () => {
  const plain = await (await scripted("Four metres.").ask({ tools })).json();
  assert.deepEqual(plain.choices[0].message, { role: "assistant", content: "Four metres.", refusal: null });
  assert.equal(plain.choices[0].finish_reason, "stop");
  const { ask, prompts } = scripted(HERMES);
  const none = await (await ask({ tools, tool_choice: "none" })).json();
  assert.equal(none.choices[0].message.content, HERMES);
  assert.ok(!prompts.at(-1)!.includes("TOOLS"));
});

const QWEN =
  "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}" +
  '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}' +
  "\n</tool_call>{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

Deno.test("tools: a call that must be made is begun for the model, as its template writes calls", async () => {
  const named = { type: "function", function: { name: "depth" } };
  for (
    const [choice, opening, answer] of [
      ["required", '<tool_call>\n{"name":', ' "depth", "arguments": {"place": "Orford"}}\n</tool_call>'],
      [named, '<tool_call>\n{"name": "depth", "arguments":', ' {"place": "Orford"}}\n</tool_call>'],
    ] as const
  ) {
    const { ask, prompts } = scripted(answer, QWEN);
    const { choices: [whole] } = await (await ask({ tools, tool_choice: choice })).json();
    assert.ok(prompts.at(-1)!.endsWith(`<user>How deep?<end>\n<assistant>${opening}`), prompts.at(-1));
    assert.equal(whole.message.content, null);
    assert.deepEqual(whole.message.tool_calls[0].function, { name: "depth", arguments: '{"place":"Orford"}' });
    assert.equal(whole.finish_reason, "tool_calls");
    const text = await (await ask({ tools, tool_choice: choice, stream: true })).text();
    const deltas = text.split("\n\n").filter((e) => e.startsWith("data: {")).map((e) =>
      JSON.parse(e.slice(6)).choices[0].delta
    );
    assert.equal(deltas.map((delta) => delta.content ?? "").join(""), "");
    assert.deepEqual(deltas.flatMap((delta) => delta.tool_calls ?? []).map((call) => call.function.name), ["depth"]);
  }
  // What the model goes on with instead is not lost.
  const { choices: [other] } = await (await scripted(" no", QWEN).ask({ tools, tool_choice: "required" })).json();
  assert.deepEqual([other.message.content, other.finish_reason], ['<tool_call>\n{"name": no', "stop"]);
});

Deno.test({
  name: "ChatTemplate: calls begin as real templates write them",
  ignore: shared.absent,
  fn() {
    const openings = (name: string) => {
      const template = new ChatTemplate(Deno.readTextFileSync(shared.path(`templates/${name}.jinja`)), {
        bos: "<s>",
        eos: "</s>",
      });
      const messages = [{ role: "user", content: "How deep?" }];
      return ["", "depth"].map((tool) =>
        template.callOpening(messages, { tools: tools as ChatTool[] }, tool || undefined)
      );
    };
    const hermes = ['<tool_call>\n{"name":', '<tool_call>\n{"name": "depth", "arguments":'];
    assert.deepEqual(openings("Qwen-Qwen2.5-7B-Instruct"), hermes);
    assert.deepEqual(openings("NousResearch-Hermes-3-Llama-3.1-8B-tool_use"), hermes);
    assert.deepEqual(openings("meta-llama-Llama-3.3-70B-Instruct"), ['{"name":', '{"name": "depth", "parameters":']);
    assert.deepEqual(openings("unsloth-mistral-Devstral-Small-2507"), ["[TOOL_CALLS]", "[TOOL_CALLS]depth[ARGS]"]);
    assert.deepEqual(openings("Qwen3-Coder"), [undefined, undefined]);
  },
});

Deno.test("tools: calls and their results go back to the model", async () => {
  const { ask, prompts } = scripted("4.2 m.");
  const response = await ask({
    tools,
    messages: [
      { role: "user", content: "How deep?" },
      {
        role: "assistant",
        content: null,
        tool_calls: [{ id: "abc", type: "function", function: { name: "depth", arguments: '{"place": "Orford"}' } }],
      },
      { role: "tool", tool_call_id: "abc", content: "4.2" },
    ],
  });
  assert.equal(response.status, 200);
  assert.match(prompts.at(-1)!, /assistant: <call abc depth Orford>\s*tool: 4.2<answer abc depth>\s*$/);
});

Deno.test("tools: what cannot be done is refused by name", async () => {
  const call = (text: string) => ({ id: "a", type: "function", function: { name: "f", arguments: text } });
  for (
    const [template, body, param] of [
      ["{{ messages[0].content }}", { tools }, "tools"],
      [TEMPLATE, { tools, tool_choice: "required" }, "tool_choice"],
      [TEMPLATE, { tools, tool_choice: { type: "function", function: { name: "depth" } } }, "tool_choice"],
      [QWEN, { tools, tool_choice: { type: "function", function: { name: "width" } } }, "tool_choice"],
      [QWEN, { tools, tool_choice: "sometimes" }, "tool_choice"],
      [QWEN, { tool_choice: "required" }, "tool_choice"],
      [TEMPLATE, { tools, parallel_tool_calls: false }, "parallel_tool_calls"],
      [TEMPLATE, { tools: [{ type: "web_search" }] }, "tools.0.type"],
      [TEMPLATE, { tools: [{ type: "function", function: { name: "a b" } }] }, "tools.0.function.name"],
      [TEMPLATE, { functions: [{ name: "f" }] }, "functions"],
      [
        TEMPLATE,
        { messages: [{ role: "assistant", tool_calls: [call("{")] }] },
        "messages.0.tool_calls.0.function.arguments",
      ],
      [TEMPLATE, { messages: [{ role: "assistant" }] }, "messages.0.content"],
    ] as const
  ) {
    const response = await scripted("x", template).ask(body);
    const { error } = await response.json();
    assert.equal(response.status, 400, JSON.stringify(body));
    assert.equal(error.param, param, error.message);
  }
});
