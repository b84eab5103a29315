import { Template } from "@huggingface/jinja";
import { ChatTemplateError } from "./errors.ts";

/** One turn of a conversation. */
export interface ChatMessage {
  readonly role: string;
  readonly content: string;
}

/** Options of {@linkcode ChatTemplate.render}. */
export interface RenderOptions {
  /** End with what opens the assistant's turn. @default {true} */
  addGenerationPrompt?: boolean;
}

const MAX_TEMPLATE_CHARACTERS = 1 << 18;
const MAX_OUTPUT_CHARACTERS = 1 << 24;
/** Used for models that bring no template: plain, so that base models can go on with it. */
const FALLBACK =
  "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}";

/** Turns a conversation into the text that the model was trained on. */
export class ChatTemplate {
  /** Whether the model brought no template, and a plain one is used. */
  readonly isFallback: boolean;
  readonly #template: Template;
  readonly #tokens: { readonly bos_token: string; readonly eos_token: string };

  /**
   * @param source Jinja; `undefined` uses a plain template.
   * @throws {ChatTemplateError} when it is malformed.
   */
  constructor(source: string | undefined, tokens: { bos?: string | undefined; eos?: string | undefined } = {}) {
    this.isFallback = source === undefined;
    if ((source ?? "").length > MAX_TEMPLATE_CHARACTERS) {
      throw new ChatTemplateError(
        `the chat template has ${source!.length} characters; ${MAX_TEMPLATE_CHARACTERS} may be`,
      );
    }
    this.#tokens = { bos_token: tokens.bos ?? "", eos_token: tokens.eos ?? "" };
    try {
      this.#template = new Template(source ?? FALLBACK);
    } catch (cause) {
      throw new ChatTemplateError(`the model's chat template is malformed: ${(cause as Error).message}`, { cause });
    }
  }

  /** @throws {ChatTemplateError} when the template fails or refuses the conversation. */
  render(messages: readonly ChatMessage[], options: RenderOptions = {}): string {
    let text: string;
    try {
      text = this.#template.render({
        ...this.#tokens,
        messages: messages.map((message) => ({ ...message })),
        add_generation_prompt: options.addGenerationPrompt ?? true,
      });
    } catch (cause) {
      throw new ChatTemplateError(`the model's chat template failed: ${(cause as Error).message}`, { cause });
    }
    if (text.length > MAX_OUTPUT_CHARACTERS) throw new ChatTemplateError("the chat template's output is too long");
    return text;
  }
}
