import { existsSync, renameSync } from "node:fs";
import { join } from "node:path";
import { cacheFolder } from "./cache.ts";
import { SHAPES, writeSyntheticModel } from "./synthetic_model.ts";

/** The path of a synthetic model in the cache folder, where it is written when it is not there yet. */
export function modelFile(shapeName: string, type: string, headType: string | undefined): string {
  const path = join(cacheFolder("models"), `${shapeName}-${type}${headType === undefined ? "" : `-${headType}`}.gguf`);
  if (!existsSync(path)) {
    console.error(`writing a ${shapeName} of ${type} …`);
    const part = `${path}.part`;
    writeSyntheticModel(part, {
      shape: SHAPES[shapeName]!,
      type,
      ...(headType === undefined ? {} : { headType }),
    });
    renameSync(part, path);
  }
  return path;
}
