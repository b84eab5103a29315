/** The web page in a real browser against a real server. */
import assert from "node:assert/strict";
import { chromium } from "playwright-core";
import { createApp } from "../api/mod.ts";
import { startCluster } from "../../tests/cluster.ts";
import { repoPath } from "../../tests/data.ts";

const browserPath = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find((path) => {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
});
if (browserPath === undefined && Deno.env.get("CI") === "true") {
  throw new Error("CI needs a Chromium for the web page's tests: apt-get install chromium");
}

Deno.test({
  name: "page: streams an answer, stops one, chats, shows errors and asks for a key (needs Chromium)",
  ignore: browserPath === undefined,
  // The browser is another program: playwright keeps pipes and timers to it that outlive its close() by a moment.
  sanitizeOps: false,
  sanitizeResources: false,
  async fn() {
    // The slow kernels, so that an answer is still under way when a person would stop it.
    await using cluster = await startCluster(repoPath("models", "lutra-books-6M-TQ2_0.gguf"), { isa: "portable" });
    const { engine } = cluster;
    const page = Deno.readTextFileSync(repoPath("orchestrator", "page", "page.html"));
    const app = createApp({ engine, page, apiKey: "otter" });
    const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, app.fetch);
    const browser = await chromium.launch({ executablePath: browserPath!, args: ["--no-sandbox"] });
    try {
      const tab = await browser.newPage({ viewport: { width: 390, height: 700 } });
      const problems: string[] = [];
      tab.on("pageerror", (error) => problems.push(String(error)));
      tab.on("console", (message) => {
        // The browser itself reports the 401 and 400 that this test provokes.
        if (message.type() === "error" && !/status of 40[01]/.test(message.text())) problems.push(message.text());
      });
      tab.on("dialog", (dialog) => void dialog.accept("otter"));
      await tab.goto(`http://127.0.0.1:${server.addr.port}/`);
      await tab.locator("#model", { hasText: "lutra-books-6M-TQ2_0" }).waitFor();

      await tab.fill("#prompt", "Once upon a time <b>there</b>");
      await tab.fill("#tokens", "24");
      await tab.press("#prompt", "Enter");
      await tab.waitForSelector("article.answer .rate");
      const answer = await tab.textContent("article.answer p");
      assert.ok((answer ?? "").length > 10, `an answer: ${answer}`);
      assert.match(await tab.textContent("article.answer .rate") ?? "", /^24 tokens, [\d.]+ a second$/);
      assert.equal(await tab.locator("article b").count(), 0, "text is never markup");

      await tab.fill("#tokens", "400");
      await tab.fill("#prompt", "The old man");
      await tab.click("#send");
      await tab.locator("article.answer").nth(1).locator("p", { hasText: /.{5}/s }).waitFor();
      await tab.click("#stop");
      await tab.locator(".rate", { hasText: "stopped" }).waitFor();
      for (let i = 0; i < 100 && engine.stats().running > 0; i++) await new Promise((done) => setTimeout(done, 20));
      assert.equal(engine.stats().running, 0, "a stopped answer ends on the workers");

      await tab.check("[value=chat]");
      await tab.fill("#tokens", "8");
      await tab.fill("#prompt", "Good morning");
      await tab.click("#send");
      await tab.locator(".rate").nth(2).waitFor();

      await tab.fill("#prompt", "word ".repeat(600));
      await tab.click("#send");
      await tab.waitForSelector("article .error");
      assert.match(await tab.textContent("article .error") ?? "", /context/);

      // Nothing sticks out of a narrow screen.
      const widest = await tab.evaluate(() =>
        (globalThis as unknown as { document: { documentElement: { scrollWidth: number } } }).document.documentElement
          .scrollWidth
      );
      assert.ok(widest <= 390, `the page is ${widest} pixels wide`);
      const folder = Deno.env.get("LUTRA_SCREENSHOTS");
      if (folder !== undefined) {
        await tab.screenshot({ path: `${folder}/narrow.png` });
        for (const colorScheme of ["light", "dark"] as const) {
          await tab.emulateMedia({ colorScheme });
          await tab.setViewportSize({ width: 1100, height: 760 });
          await tab.screenshot({ path: `${folder}/${colorScheme}.png` });
        }
      }
      assert.deepEqual(problems, []);
    } finally {
      await browser.close();
      await server.shutdown();
    }
  },
});
