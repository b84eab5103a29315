import { Environment, Interpreter, Template } from "@huggingface/jinja";
import { ChatTemplateError } from "./errors.ts";
import { ToolCallParser } from "./tool_calls.ts";

/** A tool that the model may call, as OpenAI's API describes it. */
export interface ChatTool {
  readonly type: "function";
  readonly function: {
    readonly name: string;
    readonly description?: string;
    /** A JSON schema. */
    readonly parameters?: Readonly<Record<string, unknown>>;
  };
}

/** A call of a tool in a conversation. */
export interface ChatToolCall {
  readonly id?: string;
  readonly type: "function";
  /** `arguments` as a value, not as text. */
  readonly function: { readonly name: string; readonly arguments: unknown };
}

/** One turn of a conversation. */
export interface ChatMessage {
  readonly role: string;
  readonly content: string;
  readonly tool_calls?: readonly ChatToolCall[];
  /** In a tool's answer: the call that it answers. */
  readonly tool_call_id?: string;
  readonly name?: string;
}

/** Options of {@linkcode ChatTemplate.render}. */
export interface RenderOptions {
  /** End with what opens the assistant's turn. @default {true} */
  addGenerationPrompt?: boolean;
  /** Tools to offer. */
  tools?: readonly ChatTool[] | undefined;
  /** The time that templates are told. Default: now. */
  now?: Date;
}

const MAX_TEMPLATE_CHARACTERS = 1 << 18;
/** Most characters of any string that a template makes. */
const MAX_OUTPUT_CHARACTERS = 1 << 22;
/** Most characters and elements of any list or object, all that lies within it counted each time that it does. */
const MAX_WEIGHT = 1 << 24;
/** Most expressions and statements that a rendering evaluates: far beyond any real conversation, a second or two of work. */
const MAX_STEPS = 1 << 22;
/** Characters or elements that a step may pass over; more count as further steps. */
const STEP_CHARACTERS = 64;
/** Most elements of a template's `range()`. */
const MAX_RANGE = 1 << 16;
/** Longest white space in a template: the package's patterns take time in proportion to its square. */
const MAX_BLANKS = 1 << 11;
/** Widest indentation that filters write. */
const MAX_INDENT = 1 << 8;
/** A name that no template has. */
const PROBE = "lutra_probe";
/** Used for models that bring no template: plain, so that base models can go on with it. */
const FALLBACK =
  "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}";

type Node = Parameters<Interpreter["evaluate"]>[0];
type Value = ReturnType<Interpreter["evaluate"]>;
type Argument = Node & { value?: Node };

/** Stands in a syntax tree for what it was evaluated to. */
class Evaluated {
  readonly type = "Evaluated";
  readonly value: Value;

  constructor(value: Value) {
    this.value = value;
  }
}

/** Filters that look at no more of a list than its length or an end. */
const SHALLOW = new Set(["length", "count", "first", "last", "list", "safe", "default", "d"]);

/**
 * Runs templates that come with model files, which nobody has looked at: it counts steps and measures what they make. Where
 * the package is laxer than Jinja it is made strict, as a template that fails may be asked in another way.
 */
class BoundedInterpreter extends Interpreter {
  #steps = 0;
  /** Texts that went through the filter `safe`. */
  readonly #safe = new WeakSet<Value>();
  /** Texts whose `replace` is bounded. */
  readonly #replacing = new WeakSet<Value>();
  /** Weights of lists and objects, which never change, unless there is a namespace in them. */
  readonly #weights = new WeakMap<object, number>();

  override evaluate(node: Node | undefined, environment: Environment): Value {
    if (node instanceof Evaluated) return node.value;
    this.#spend(1);
    const prepared = this.#prepared(node, environment);
    const result = prepared instanceof Evaluated ? prepared.value : super.evaluate(prepared, environment);
    const content: unknown = result?.value;
    if (typeof content !== "string") result.toString = () => this.#text(result);
    if (typeof content === "string") {
      checkLength(content.length);
      this.#spend(content.length / STEP_CHARACTERS);
    } else if (Array.isArray(content)) {
      this.#weigh(result);
      this.#spend(content.length / STEP_CHARACTERS);
    } else if (content instanceof Map) this.#weigh(result);
    return result;
  }

  /** The node with its operands evaluated, where they need a look. */
  #prepared(node: Node | undefined, environment: Environment): Node | undefined {
    if (node === undefined) return node;
    const of = node as unknown as Record<string, unknown> & {
      operator?: { value: string };
      filter?: { value?: string; callee?: { value?: string }; args?: Argument[] };
      body?: readonly Node[];
    };
    const evaluated = (key: string) => this.evaluate(of[key] as Node, environment);
    const replaced = (changes: Record<string, Value>) =>
      Object.assign(Object.create(Object.getPrototypeOf(node)), node, {
        ...Object.fromEntries(Object.entries(changes).map(([key, value]) => [key, new Evaluated(value)])),
      });
    if (node.type === "BinaryExpression" && of.operator?.value === "+") {
      const [left, right] = [evaluated("left"), evaluated("right")];
      if ((left.type === "StringValue") !== (right.type === "StringValue")) {
        throw new ChatTemplateError(`it adds ${left.type} and ${right.type}`);
      }
      if (!this.#safe.has(left) && !this.#safe.has(right)) return replaced({ left, right });
      const sum = [left, right].map((side) =>
        this.#safe.has(side) ? String(side.value) : escapeHtml(String(side.value))
      );
      return new Evaluated(this.#markSafe(runtimeValue(sum.join("")))) as unknown as Node;
    }
    if (node.type === "BinaryExpression" && of.operator?.value === "~") {
      const texts = [evaluated("left"), evaluated("right")].map((side) => this.#text(side));
      return new Evaluated(runtimeValue(texts.join(""))) as unknown as Node;
    }
    if (node.type === "BinaryExpression" && (of.operator?.value === "in" || of.operator?.value === "not in")) {
      const right = evaluated("right");
      if (Array.isArray(right.value)) this.#spend(right.value.length / 8); // compared one by one
      return replaced({ right });
    }
    if (node.type === "MemberExpression") {
      const object = this.#bounded(evaluated("object"));
      const property = of.property as Node & { value?: unknown };
      // A slice of a text is made by way of a list of its characters.
      if (property.type === "SliceExpression" && typeof object.value === "string") this.#spend(object.value.length);
      if (object.type === "ObjectValue" && of.computed === true && property.type !== "SliceExpression") {
        const key = evaluated("property");
        // A key that is undefined has no value.
        if (key.type === "UndefinedValue") return new Evaluated(key) as unknown as Node;
        return replaced({ object, property: key });
      }
      // In Python a dictionary's methods come before its keys of the same names.
      const method = object.type === "ObjectValue" && of.computed !== true && DICTIONARY_METHODS.has(property.value)
        ? object.builtins.get(property.value as string)
        : undefined;
      return method === undefined ? replaced({ object }) : new Evaluated(method) as unknown as Node;
    }
    // In Python an undefined value can be iterated over, in vain.
    if (node.type === "For" && (of.iterable as { type: string }).type !== "SelectExpression") {
      const iterable = evaluated("iterable");
      return replaced({ iterable: iterable.type === "UndefinedValue" ? runtimeValue([]) : iterable });
    }
    if (node.type === "TestExpression" && (of.test as { value?: string }).value === "iterable") {
      const operand = evaluated("operand");
      return replaced({ operand: operand.type === "UndefinedValue" ? runtimeValue([]) : operand });
    }
    if (node.type === "FilterStatement") {
      const operand = { type: "Program", body: of.body };
      return new Evaluated(
        this.evaluate({ type: "FilterExpression", operand, filter: of.filter } as unknown as Node, environment),
      ) as unknown as Node;
    }
    if (node.type === "FilterExpression") {
      let operand = this.#bounded(evaluated("operand"));
      const filter = of.filter?.value ?? of.filter?.callee?.value ?? "";
      // Jinja selects nothing from none.
      if (operand.type === "NullValue" && ["selectattr", "rejectattr", "map"].includes(filter)) {
        operand = runtimeValue([]);
      }
      if (filter === "safe" && operand.type === "StringValue") {
        return new Evaluated(this.#markSafe(runtimeValue(operand.value))) as unknown as Node;
      }
      if (filter === "string" || (filter === "trim" && operand.type === "UndefinedValue")) {
        operand = runtimeValue(this.#text(operand));
      }
      if (filter === "indent" || filter === "tojson" || filter === "join") {
        this.#checkGrowth(operand, filter, of.filter?.args ?? [], environment);
      }
      if (!SHALLOW.has(filter)) this.#spend(this.#weigh(operand) / STEP_CHARACTERS);
      return replaced({ operand });
    }
    return node;
  }

  /** Refuses what these filters would make too large, before they make it. */
  #checkGrowth(operand: Value, filter: string, args: readonly Argument[], environment: Environment): void {
    // Widths, and the longest text between two elements; which argument is which does not matter.
    let [width, separator] = [filter === "indent" ? 4 : 0, 2];
    for (const argument of args) {
      const named = argument.type === "KeywordArgumentExpression";
      const { value } = this.evaluate(named ? argument.value : argument, environment);
      if (typeof value === "number") width = Math.max(width, value);
      if (width > MAX_INDENT) {
        throw new ChatTemplateError(`it indents by ${width} characters; ${MAX_INDENT} may be`);
      }
      const texts: readonly unknown[] = Array.isArray(value) ? value.map((item: Value) => item.value) : [value];
      for (const text of texts) if (typeof text === "string") separator = Math.max(separator, text.length);
    }
    const measure = (value: Value, depth: number): number => {
      const content: unknown = value?.value;
      if (typeof content === "string") return content.length;
      const items = content instanceof Map ? [...content.values()] : Array.isArray(content) ? content : [];
      let length = 0;
      for (const item of items) {
        length += separator + width * depth + measure(item, depth + 1);
        checkLength(length);
      }
      return length;
    };
    const text: unknown = operand.value;
    if (typeof text !== "string") checkLength(measure(operand, 1));
    else if (filter === "indent") checkLength(text.length + width * count(text, "\n"));
    else if (filter === "join") checkLength(text.length * (1 + separator));
  }

  /** A text whose `replace` makes no longer one than a template may. */
  #bounded(value: Value): Value {
    const replace = value.type === "StringValue" && !this.#replacing.has(value) && value.builtins.get("replace");
    if (typeof replace !== "object") return value;
    const text = String(value.value);
    const call = (args: readonly Value[], environment: Environment): Value => {
      const [from, to] = args.map((argument): unknown => argument.value);
      if (typeof from === "string" && typeof to === "string") {
        this.#spend(text.length / STEP_CHARACTERS);
        checkLength(text.length + count(text, from) * Math.max(0, to.length - from.length));
      }
      return (replace.value as typeof call)(args, environment);
    };
    (value.builtins as Map<string, Value>).set(
      "replace",
      Object.assign(Object.create(Object.getPrototypeOf(replace)), replace, { value: call }),
    );
    this.#replacing.add(value);
    return value;
  }

  /** A value as Python writes it. */
  #text(value: Value): string {
    this.#spend(this.#weigh(value) / STEP_CHARACTERS);
    return pythonText(value, false);
  }

  #markSafe(value: Value): Value {
    this.#safe.add(value);
    return value;
  }

  #spend(steps: number): void {
    this.#steps += steps;
    if (this.#steps > MAX_STEPS) throw new ChatTemplateError(`it takes more than ${MAX_STEPS} steps`);
  }

  /** Characters and elements of a value, with all within it. */
  #weigh(value: Value): number {
    let changing = false;
    const weigh = (value: Value): number => {
      const content: unknown = value?.value;
      if (typeof content === "string") return 1 + content.length;
      if (!Array.isArray(content) && !(content instanceof Map)) return 1;
      const known = this.#weights.get(value);
      if (known !== undefined) return known;
      const before = changing;
      changing = value.type === "NamespaceValue";
      this.#spend(content instanceof Map ? content.size : content.length);
      let weight = 1;
      const add = (more: number) => {
        weight += more;
        if (weight > MAX_WEIGHT) throw new ChatTemplateError(`it makes a value of more than ${MAX_WEIGHT} characters`);
      };
      if (content instanceof Map) { for (const [key, item] of content) add(String(key).length + weigh(item)); }
      else for (const item of content) add(weigh(item));
      if (!changing) this.#weights.set(value, weight);
      changing ||= before;
      return weight;
    };
    return weigh(value);
  }
}

function checkLength(characters: number): void {
  if (characters > MAX_OUTPUT_CHARACTERS) {
    throw new ChatTemplateError(`it writes more than ${MAX_OUTPUT_CHARACTERS} characters`);
  }
}

/** How often `part` occurs; the empty one before every character and at the end. */
function count(text: string, part: string): number {
  if (part === "") return text.length + 1;
  let found = 0;
  for (let at = text.indexOf(part); at >= 0; at = text.indexOf(part, at + part.length)) found++;
  return found;
}

/** A JavaScript value as the package has it. */
function runtimeValue(value: unknown): Value {
  return new Environment().set("value", value);
}

/** A value as Python's `str` writes it, or as its `repr` does. */
function pythonText(value: Value, repr: boolean): string {
  const content: unknown = value.value;
  if (typeof content === "string") return repr ? quoted(content) : content;
  if (typeof content === "boolean") return content ? "True" : "False";
  if (value.type === "NullValue") return "None";
  if (content === undefined) return "";
  if (Array.isArray(content)) return `[${content.map((item) => pythonText(item, true)).join(", ")}]`;
  if (content instanceof Map) {
    return `{${[...content].map(([key, item]) => `${quoted(String(key))}: ${pythonText(item, true)}`).join(", ")}}`;
  }
  return Object.getPrototypeOf(value).toString.call(value);
}

function quoted(text: string): string {
  const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
  const names: Readonly<Record<string, string>> = {
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\\": "\\\\",
    [quote]: `\\${quote}`,
  };
  return quote + text.replaceAll(/[\n\r\t\\'"]/g, (character) => names[character] ?? character) + quote;
}

/** What Jinja does to a text that meets one of the filter `safe`, though templates of chats are no HTML. */
function escapeHtml(text: string): string {
  return text.replaceAll(/[&<>'"]/g, (character) => `&${HTML_NAMES[character]!};`);
}
const HTML_NAMES: Readonly<Record<string, string>> = { "&": "amp", "<": "lt", ">": "gt", "'": "#39", '"': "#34" };
const DICTIONARY_METHODS: ReadonlySet<unknown> = new Set(["items", "keys", "values", "get"]);

/** Jinja's `range`, of bounded length. */
function range(start: number, stop?: number, step = 1): number[] {
  const [from, to] = stop === undefined ? [0, start] : [start, stop];
  const count = Math.max(0, Math.ceil((to - from) / step));
  if (!(count <= MAX_RANGE)) throw new ChatTemplateError(`range() has ${count} elements; ${MAX_RANGE} may be`);
  return Array.from({ length: count }, (_, i) => from + i * step);
}

/** Turns a conversation into the text that the model was trained on. */
export class ChatTemplate {
  /** Whether the model brought no template, and a plain one is used. */
  readonly isFallback: boolean;
  readonly #template: Template;
  #takesTools: boolean | undefined;
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
    let blanks = 0;
    for (const [run] of (source ?? "").matchAll(/\s+/g)) blanks = Math.max(blanks, run.length);
    if (blanks > MAX_BLANKS) {
      throw new ChatTemplateError(`the chat template has ${blanks} blanks in a row; ${MAX_BLANKS} may be`);
    }
    this.#tokens = { bos_token: tokens.bos ?? "", eos_token: tokens.eos ?? "" };
    try {
      this.#template = new Template(source ?? FALLBACK);
    } catch (cause) {
      throw new ChatTemplateError(`the model's chat template is malformed: ${(cause as Error).message}`, { cause });
    }
  }

  /** Whether tools that it is given come to the model. */
  get takesTools(): boolean {
    return this.#takesTools ??= this.#probe();
  }

  #probe(): boolean {
    const tool: ChatTool = {
      type: "function",
      function: { name: PROBE, description: PROBE, parameters: { type: "object", properties: {} } },
    };
    try {
      return this.render([{ role: "user", content: "Hello" }], { tools: [tool] }).includes(PROBE);
    } catch {
      return false;
    }
  }

  /**
   * The conversation as text. Arguments of tool calls are given as objects, which most templates want, or else as JSON.
   *
   * @throws {ChatTemplateError} when the template fails or refuses the conversation.
   */
  render(messages: readonly ChatMessage[], options: RenderOptions = {}): string {
    try {
      return this.#render(messages, options);
    } catch (error) {
      if (!messages.some((message) => message.tool_calls !== undefined)) throw error;
      try {
        return this.#render(messages.map(withTextArguments), options);
      } catch {
        throw error; // what the template says of the usual form
      }
    }
  }

  /**
   * What the model begins a call of a tool with, behind what `render` ends with, as the template itself writes calls: up to
   * the tool's name, or with `name` up to its arguments. `undefined`: in no form that {@linkcode ToolCallParser} understands.
   */
  callOpening(messages: readonly ChatMessage[], options: RenderOptions, name?: string): string | undefined {
    const tool = name ?? PROBE;
    const call = { id: "lutraCall", type: "function", function: { name: tool, arguments: { [PROBE]: 1 } } } as const;
    const prompt = this.render(messages, options);
    let whole: string;
    try {
      const answer = { role: "assistant", content: "", tool_calls: [call] };
      whole = this.render([...messages, answer], { ...options, addGenerationPrompt: false });
    } catch (error) {
      if (!(error instanceof ChatTemplateError)) throw error;
      return undefined;
    }
    if (!whole.startsWith(prompt)) return undefined;
    // Without the tokens that end the answer.
    const [written = ""] = /^.*(?:\}|\]|<\/tool_call>)/s.exec(whole.slice(prompt.length)) ?? [];
    const parser = new ToolCallParser([tool]);
    const calls = [parser.push(written), parser.flush()].flatMap((part) => part.calls);
    const at = written.indexOf(tool);
    if (calls.length !== 1 || calls[0]!.name !== tool || at < 0) return undefined;
    // Models are used to quotes and blanks that are one token with what follows.
    if (name === undefined) return written.slice(0, at).replace(/\s*"?$/, "");
    const end = written.indexOf("{", at + tool.length);
    return end < 0 ? undefined : written.slice(0, end).trimEnd();
  }

  #render(messages: readonly ChatMessage[], options: RenderOptions): string {
    let text: string;
    try {
      const environment = new Environment();
      const globals: Record<string, unknown> = {
        ...{ true: true, True: true, false: false, False: false, none: null, None: null },
        ...this.#tokens,
        range,
        raise_exception: (message: string) => {
          throw new ChatTemplateError(message);
        },
        strftime_now: (format: string) => strftime(format, options.now ?? new Date()),
        messages: messages.map((message) => ({ ...message })),
        tools: options.tools === undefined || options.tools.length === 0 ? null : options.tools,
        documents: null,
        add_generation_prompt: options.addGenerationPrompt ?? true,
      };
      for (const [name, value] of Object.entries(globals)) environment.set(name, value);
      text = String(new BoundedInterpreter(environment).run(this.#template.parsed).value);
    } catch (cause) {
      throw new ChatTemplateError(`the model's chat template failed: ${(cause as Error).message}`, { cause });
    }
    return text;
  }
}

/** The message with its calls' arguments as JSON, in a string. */
function withTextArguments(message: ChatMessage): ChatMessage {
  if (message.tool_calls === undefined) return message;
  const tool_calls = message.tool_calls.map((call) => ({
    ...call,
    function: { ...call.function, arguments: JSON.stringify(call.function.arguments) },
  }));
  return { ...message, tool_calls };
}

const MONTHS = "January February March April May June July August September October November December".split(" ");
const WEEKDAYS = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split(" ");

/** The fields of strftime that templates use. */
function strftime(format: string, now: Date): string {
  const two = (n: number) => String(n).padStart(2, "0");
  const [month, weekday] = [MONTHS[now.getMonth()]!, WEEKDAYS[now.getDay()]!];
  const fields: Readonly<Record<string, string>> = {
    Y: String(now.getFullYear()),
    m: two(now.getMonth() + 1),
    d: two(now.getDate()),
    H: two(now.getHours()),
    M: two(now.getMinutes()),
    S: two(now.getSeconds()),
    B: month,
    b: month.slice(0, 3),
    A: weekday,
    a: weekday.slice(0, 3),
    "%": "%",
  };
  return format.replace(/%([YmdHMSBbAa%])/g, (_, field: string) => fields[field]!);
}
