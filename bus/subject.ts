import { SubjectError } from "./errors.ts";

const TOKEN = /^[^\s.*>]+$/;

/**
 * Checks a subject to publish to: dot-separated, non-empty tokens without wildcards or whitespace.
 *
 * @throws {SubjectError}
 */
export function checkSubject(subject: string): void {
  for (const token of subject.split(".")) {
    if (!TOKEN.test(token)) throw new SubjectError(`malformed subject ${JSON.stringify(subject)}`);
  }
}

/**
 * Compiles a subscription pattern (`*` is any one token, a final `>` is one or more) to a predicate over subjects.
 *
 * @throws {SubjectError}
 */
export function subjectMatcher(pattern: string): (subject: string) => boolean {
  const tokens = pattern.split(".");
  tokens.forEach((token, i) => {
    const wild = token === "*" || (token === ">" && i === tokens.length - 1);
    if (!wild && !TOKEN.test(token)) throw new SubjectError(`malformed subscription ${JSON.stringify(pattern)}`);
  });
  if (!tokens.includes("*") && !tokens.includes(">")) return (subject) => subject === pattern;
  const tail = tokens.at(-1) === ">";
  const fixed = tail ? tokens.slice(0, -1) : tokens;
  return (subject) => {
    const parts = subject.split(".");
    if (tail ? parts.length <= fixed.length : parts.length !== fixed.length) return false;
    return fixed.every((token, i) => token === "*" || token === parts[i]);
  };
}
