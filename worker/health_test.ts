import assert from "node:assert/strict";
import { join } from "node:path";
import type { Finding } from "../bus/mod.ts";
import { deviceHealth } from "./health.ts";

const CPU = "/sys/devices/system/cpu";
const ZONE = "/sys/class/thermal/thermal_zone1";
const FIRMWARE = "/sys/devices/platform/soc/soc:firmware/get_throttled";

/** What is found on a device of four cores with these files. */
async function found(files: Record<string, string>): Promise<(check: string) => Finding | undefined> {
  const read = (paths: readonly string[]) =>
    Promise.resolve(new Map(Object.entries(files).filter(([path]) => paths.includes(path))));
  const findings = await deviceHealth({ cores: 4, read });
  assert.equal(new Set(findings.map(({ check }) => check)).size, findings.length, "no check twice");
  return (check) => findings.find((finding) => finding.check === check);
}

Deno.test("deviceHealth: a board that is well, and one that tells nothing, have nothing to mend", async () => {
  const well = await found({
    [`${CPU}/cpu0/cpufreq/scaling_governor`]: "ondemand",
    [`${CPU}/cpu0/cpufreq/scaling_max_freq`]: "2400000",
    [`${CPU}/cpu0/cpufreq/cpuinfo_max_freq`]: "2400000",
    [`${ZONE}/temp`]: "51234",
    [`${ZONE}/type`]: "cpu-thermal",
    [`${ZONE}/trip_point_0_temp`]: "110000",
    [`${ZONE}/trip_point_0_type`]: "critical",
    [FIRMWARE]: "0",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
    "/sys/fs/cgroup/cpu.max": "max 100000",
  });
  const silent = await found({});
  for (const check of ["clock speed", "heat", "power", "huge pages"]) assert.equal(well(check)?.state, "ok", check);
  assert.equal(well("heat")!.detail, "cpu-thermal has 51.234 °C");
  assert.equal(well("quota"), undefined);
  for (const check of ["clock speed", "heat", "huge pages"]) assert.equal(silent(check)?.state, "ok", check);
  assert.equal(silent("power"), undefined);
});

Deno.test("deviceHealth: heat, a low clock, a weak power supply, a quota and no huge pages are told with what mends them", async () => {
  const hot = await found({
    [`${ZONE}/temp`]: "86000",
    [`${ZONE}/trip_point_0_temp`]: "110000",
    [`${ZONE}/trip_point_0_type`]: "critical",
    [`${ZONE}/trip_point_1_temp`]: "85000",
    [`${ZONE}/trip_point_1_type`]: "passive",
    [`${CPU}/cpu2/cpufreq/scaling_max_freq`]: "1500000",
    [`${CPU}/cpu2/cpufreq/cpuinfo_max_freq`]: "2400000",
    [FIRMWARE]: "50005",
    "/proc/self/cgroup": "0::/system.slice/lutra.service",
    "/sys/fs/cgroup/system.slice/lutra.service/cpu.max": "25000 100000",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
  });
  assert.deepEqual([hot("heat")!.state, hot("heat")!.detail], [
    "failed",
    "zone 1 has 86 °C, from 85 °C on it is slowed down",
  ]);
  assert.deepEqual([hot("clock speed")!.state, hot("clock speed")!.detail], [
    "warning",
    "held down: cpu2 at 1.5 GHz of 2.4 GHz",
  ]);
  assert.deepEqual([hot("power")!.state, hot("power")!.detail], [
    "failed",
    "the firmware tells: too little voltage, slowed down",
  ]);
  assert.match(hot("power")!.fix!, /power supply/);
  assert.match(hot("quota")!.detail, /^4 threads share 0\.25 cores/);
  assert.match(hot("huge pages")!.fix!, /echo madvise/);
  for (const check of ["heat", "clock speed", "power", "quota", "huge pages"]) assert(hot(check)!.fix, check);
});

Deno.test("deviceHealth: what was, and what only one driver means, is told apart", async () => {
  const past = await found({ [FIRMWARE]: "0xe0000", [`${CPU}/cpu0/cpufreq/scaling_governor`]: "powersave" });
  assert.deepEqual([past("power")!.state, past("power")!.detail], [
    "warning",
    "since it started there was: clock held down, slowed down, near its limit of heat",
  ]);
  assert.match(past("power")!.fix!, /cool it/);
  assert.deepEqual([past("clock speed")!.state, past("clock speed")!.detail], [
    "warning",
    "cpu0 save power at the lowest clock",
  ]);
  const intel = await found({
    [`${CPU}/cpu0/cpufreq/scaling_governor`]: "powersave",
    [`${CPU}/cpu0/cpufreq/scaling_driver`]: "intel_pstate",
  });
  assert.equal(intel("clock speed")!.state, "ok");
});

Deno.test("deviceHealth: a cache folder must be, or become, a folder that can be written; a model must be readable", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const file = join(folder, "file");
    await Deno.writeTextFile(file, "GGUF");
    const health = async (cacheFolder: string, model: string) =>
      (await deviceHealth({ cores: 1, cacheFolder, model, read: () => Promise.resolve(new Map()) })).slice(0, 2);
    const [fresh, model] = await health(join(folder, "not", "yet"), file);
    assert.notEqual(fresh!.state, "failed", JSON.stringify(fresh)); // a full disk is a warning
    assert.equal(model!.state, "ok");
    assert.deepEqual(
      (await Array.fromAsync(Deno.readDir(folder))).map(({ name }) => name),
      ["file"],
      "nothing is left",
    );
    const [blocked, missing] = await health(join(file, "cache"), join(folder, "none.gguf"));
    assert.equal(blocked!.state, "failed");
    assert.match(blocked!.detail, /file is no folder/);
    assert.match(blocked!.fix!, /chown .*LUTRA_CACHE/);
    assert.equal(missing!.state, "warning");
    assert.equal((await health("/proc/lutra", file))[0]!.state, "failed", "not even root may write there");
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("deviceHealth: reads this system's own files", async () => {
  const findings = await deviceHealth({ cores: 1 });
  if (Deno.build.os !== "linux") return assert.deepEqual(findings, []);
  assert.deepEqual(findings.map(({ check }) => check).filter((check) => !["power", "quota"].includes(check)), [
    "clock speed",
    "heat",
    "huge pages",
  ]);
});
