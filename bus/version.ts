import configuration from "../deno.json" with { type: "json" };

/** The version of Lutra. */
export const LUTRA_VERSION: string = configuration.version;
