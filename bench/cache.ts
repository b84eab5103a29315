import { mkdirSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";

/**
 * A folder for what benchmarks make or install and can make again: `LUTRA_BENCH_CACHE`, else `lutra-bench` in the system's
 * cache folder. It can be deleted at any time.
 */
export function cacheFolder(...parts: string[]): string {
  const caches = Deno.env.get("XDG_CACHE_HOME") ?? join(homedir(), ".cache");
  const folder = join(Deno.env.get("LUTRA_BENCH_CACHE") ?? join(caches, "lutra-bench"), ...parts);
  mkdirSync(folder, { recursive: true });
  return folder;
}
