import { InvalidArgumentError } from "commander";

/** Parses a list with commas of names that are known, in any case. */
export function listOf<T extends string>(known: readonly T[]): (text: string) => T[] {
  return (text) =>
    text.split(",").map((name) => {
      const found = known.find((one) => one.toLowerCase() === name.trim().toLowerCase());
      if (found === undefined) {
        throw new InvalidArgumentError(`${JSON.stringify(name)} is none of ${known.join(", ")}.`);
      }
      return found;
    });
}

/** Parses a list with commas of numbers, 1 or above. */
export function countsOf(text: string): number[] {
  return text.split(",").map((part) => {
    const value = Number(part);
    if (!/^\d+$/.test(part.trim()) || value < 1) throw new InvalidArgumentError("It must be whole numbers above 0.");
    return value;
  });
}
