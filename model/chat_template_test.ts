import assert from "node:assert/strict";
import { fixture, shared } from "../tests/data.ts";
import { ChatTemplate } from "./chat_template.ts";
import { ChatTemplateError } from "./errors.ts";
import { loadModel } from "./load.ts";

const talk = [{ role: "system", content: "Be brief." }, { role: "user", content: "Hello" }];

Deno.test("ChatTemplate: renders the model's own template", async () => {
  const { chatTemplate } = await loadModel(fixture("llama-tiny-f32.gguf"));
  assert.equal(chatTemplate.isFallback, false);
  assert.equal(
    chatTemplate.render(talk),
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
  );
  assert.ok(!chatTemplate.render(talk, { addGenerationPrompt: false }).endsWith("assistant\n"));
});

Deno.test("ChatTemplate: a model without one gets a plain one, and says so", async () => {
  const { chatTemplate } = await loadModel(fixture("llama-tiny-f16.gguf"));
  assert.equal(chatTemplate.isFallback, true);
  assert.equal(chatTemplate.render(talk), "System: Be brief.\nUser: Hello\nAssistant:");
});

Deno.test("ChatTemplate: malformed, refusing and failing templates are errors of its own", () => {
  assert.throws(() => new ChatTemplate("{% for x in %}"), ChatTemplateError);
  assert.throws(() => new ChatTemplate("{{ raise_exception('no system') }}").render(talk), /no system/);
  assert.throws(() => new ChatTemplate("{{ messages[9] + 1 }}").render(talk), ChatTemplateError);
});

Deno.test("ChatTemplate: a hostile template cannot run or write for ever", () => {
  for (
    const source of [
      "{% for i in range(1000000000) %}x{% endfor %}",
      "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
      "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
      "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ]
  ) {
    assert.throws(() => new ChatTemplate(source).render(talk), ChatTemplateError, source);
  }
});

Deno.test({
  name: "ChatTemplate: the templates of real models render a conversation or refuse it in their own words",
  ignore: shared.absent,
  fn() {
    const names = [...Deno.readDirSync(shared.path("templates"))].map((entry) => entry.name).filter((n) =>
      n.endsWith(".jinja")
    );
    assert.ok(names.length >= 25);
    const failed: string[] = [];
    for (const name of names) {
      const source = Deno.readTextFileSync(shared.path(`templates/${name}`));
      try {
        const text = new ChatTemplate(source, { bos: "<s>", eos: "</s>" }).render([{
          role: "user",
          content: "Hello, otter",
        }]);
        assert.ok(text.includes("Hello, otter"), name);
      } catch (error) {
        assert.ok(error instanceof ChatTemplateError, `${name}: ${error}`);
        failed.push(`${name}: ${error.message}`);
      }
    }
    // Jinja2 refuses these too without `functions` or `tools`, which come with tool calls.
    const needTools = ["NousResearch-Hermes-3", "fireworks-ai-llama-3-firefunction", "meetkai-functionary"];
    const unexpected = failed.filter((line) => !needTools.some((name) => line.startsWith(name)));
    assert.deepEqual(unexpected, []);
  },
});
