/**
 * Where tests find data.
 *
 * - `fixture(name)`: files the project generated itself, in `tests/fixtures` (always present).
 * - `shared`: the team's shared test data, beside the checkout (`../shared/data`, override: `LUTRA_DATA`). Tests on it
 *   are declared with `ignore: shared.absent`, which reports them as skipped; with `CI=true` absence is an error.
 *
 * @module
 */
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { join } from "node:path";

const root = fileURLToPath(new URL("..", import.meta.url));

/** Absolute path of a file in `tests/fixtures`. */
export function fixture(name: string): string {
  return join(root, "tests", "fixtures", name);
}

/** Absolute path of a file in the repository. */
export function repoPath(...parts: string[]): string {
  return join(root, ...parts);
}

const sharedRoot = Deno.env.get("LUTRA_DATA") ?? join(root, "..", "shared", "data");
const available = existsSync(join(sharedRoot, "MANIFEST.md"));

if (!available && Deno.env.get("CI") === "true") {
  throw new Error(`CI needs the shared test data, but ${sharedRoot} has no MANIFEST.md: set LUTRA_DATA to its folder`);
}

/** The shared test data. */
export const shared = {
  /** True when the folder is there. */
  available,
  /** For `Deno.test({ ignore: shared.absent, … })`. */
  absent: !available,
  /** Absolute path of `relative` inside the shared data. */
  path(relative: string): string {
    return join(sharedRoot, relative);
  },
} as const;
