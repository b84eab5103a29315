import { UnsupportedModelError } from "./errors.ts";
import type { GgufFile, GgufValue } from "./gguf.ts";

const MAX_INTEGER = 0xffff_ffff;

/** Typed access to a GGUF's metadata; every error names the key. */
export class Metadata {
  readonly #values: ReadonlyMap<string, GgufValue>;

  constructor(gguf: GgufFile) {
    this.#values = gguf.metadata;
  }

  has(key: string): boolean {
    return this.#values.has(key);
  }

  string(key: string): string | undefined {
    return this.#get(key, "a string", (v): v is string => typeof v === "string");
  }

  boolean(key: string): boolean | undefined {
    return this.#get(key, "a boolean", (v): v is boolean => typeof v === "boolean");
  }

  /** A finite number. */
  number(key: string): number | undefined {
    return this.#get(key, "a number", (v): v is number => typeof v === "number" && Number.isFinite(v));
  }

  /** An integer from `min` on that 32 bits hold. */
  integer(key: string, min = 0): number | undefined {
    const is = (v: GgufValue): v is number =>
      Number.isInteger(v) && (v as number) >= min && (v as number) <= MAX_INTEGER;
    return this.#get(key, `an integer from ${min} to ${MAX_INTEGER}`, is);
  }

  strings(key: string): readonly string[] | undefined {
    return this.#get(
      key,
      "an array of strings",
      (v): v is string[] => Array.isArray(v) && v.every((x) => typeof x === "string"),
    );
  }

  numbers(key: string): readonly number[] | undefined {
    return this.#get(
      key,
      "an array of numbers",
      (v): v is number[] => Array.isArray(v) && v.every((x) => typeof x === "number"),
    );
  }

  /** An array of bytes, signed or not. */
  bytes(key: string): Uint8Array | undefined {
    const values = this.#get(
      key,
      "an array of bytes",
      (v): v is number[] => Array.isArray(v) && v.every((x) => Number.isInteger(x) && x >= -128 && x <= 255),
    );
    return values === undefined ? undefined : Uint8Array.from(values);
  }

  /** The value, which must be there. */
  required<T>(key: string, value: T | undefined): T {
    if (value === undefined) throw new UnsupportedModelError(`the file has no ${key}`);
    return value;
  }

  #get<T extends GgufValue>(key: string, what: string, is: (value: GgufValue) => value is T): T | undefined {
    const value = this.#values.get(key);
    if (value === undefined) return undefined;
    if (!is(value)) throw new UnsupportedModelError(`${key} is not ${what}`);
    return value;
  }
}
