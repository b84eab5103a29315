import assert from "node:assert/strict";
import { SubjectError } from "./errors.ts";
import { checkSubject, subjectMatcher } from "./subject.ts";

Deno.test("subjectMatcher: literal, one-token and tail wildcards", () => {
  const cases: [pattern: string, subject: string, matches: boolean][] = [
    ["a.b", "a.b", true],
    ["a.b", "a.b.c", false],
    ["a.*", "a.b", true],
    ["a.*", "a", false],
    ["a.*", "a.b.c", false],
    ["*.b", "a.b", true],
    ["a.*.c", "a.x.c", true],
    ["a.>", "a.b", true],
    ["a.>", "a.b.c", true],
    ["a.>", "a", false],
    [">", "a", true],
    [">", "a.b", true],
    ["*", "a.b", false],
  ];
  for (const [pattern, subject, matches] of cases) {
    assert.equal(subjectMatcher(pattern)(subject), matches, `${pattern} ${subject}`);
  }
});

Deno.test("subjectMatcher: malformed patterns are refused", () => {
  for (const pattern of ["", ".", "a.", ".a", "a..b", "a b", "a.>.b", "a*", "a.b>"]) {
    assert.throws(() => subjectMatcher(pattern), SubjectError, pattern);
  }
});

Deno.test("checkSubject: wildcards and empty tokens are refused", () => {
  checkSubject("lutra.local.worker.a-1.ctl");
  for (const subject of ["", "a.", "a.*", "a.>", "a b", "a\tb", "*", "a..b"]) {
    assert.throws(() => checkSubject(subject), SubjectError, subject);
  }
});
