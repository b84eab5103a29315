import assert from "node:assert/strict";
import { checkTools, MissingToolError } from "./build_kernels.ts";
import type { Run } from "./build_kernels.ts";

const tools = (present: Record<string, string>): Run => (command) =>
  present[command] === undefined ? undefined : { success: true, stdout: present[command] };
const all = { cargo: "cargo 1.95.0", rustc: "rustc 1.95.0 (abc 2026-01-01)", cc: "cc 12" };

Deno.test("checkTools: accepts what is there", () => checkTools(tools(all)));

for (const missing of ["cargo", "cc"] as const) {
  Deno.test({
    name: `checkTools: names a missing ${missing} and how to get it`,
    ignore: Deno.build.os === "windows",
    fn() {
      const { [missing]: _, ...rest } = all;
      assert.throws(() => checkTools(tools(rest)), (error: unknown) => {
        assert.ok(error instanceof MissingToolError);
        assert.match(error.message, new RegExp(missing));
        assert.match(error.message, /Install/);
        return true;
      });
    },
  });
}

Deno.test("checkTools: names a rustc that is too old", () => {
  assert.throws(() => checkTools(tools({ ...all, rustc: "rustc 1.63.0" })), /rustc is 1\.63; Lutra needs 1\.85/);
});
