import { asCurl, asPython, body, events, refusal } from "./request.js";

const $ = (selector, within = document) => within.querySelector(selector);
const api = (path) => new URL(`v1/${path}`, document.baseURI).href;
const make = (id) => $(`#${id}`).content.firstElementChild.cloneNode(true);

const state = { model: "", about: null, picture: null, asking: null };
const columns = ["A", "B"].map((name) => new_column(name));

function headers() {
  const key = $("#key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function told(error) {
  if (error.name !== "AbortError") $("#error").textContent = error.message;
}

async function post(path, content, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(content), signal };
  const response = await fetch(api(path), options);
  if (!response.ok) throw new Error(await refusal(response));
  return response;
}

// One budget, and the panel that shows what it does.
function new_column(name) {
  const budget = make("budget");
  const panel = make("panel");
  const slider = $(".tokens", budget);
  slider.id = `tokens-${name}`;
  $(".name", budget).textContent = `Budget ${name}, visual tokens`;
  $(".name", budget).htmlFor = slider.id;
  $("h2", panel).textContent = `Budget ${name}`;
  panel.setAttribute("aria-label", `Budget ${name}`);
  const column = {
    name, budget, panel, slider, explaining: null,
    get plan() {
      const method = $(".method", budget).value;
      return { tokens: Number(slider.value), ...(method && method !== "hiprune" && { method }) };
    },
  };
  slider.addEventListener("input", () => { tell_budget(column); explain_soon(column); });
  $(".method", budget).addEventListener("change", () => explain_soon(column));
  for (const button of panel.querySelectorAll(".copy"))
    button.addEventListener("click", () => copy(column, button));
  return column;
}

const shown = () => columns.slice(0, $("#compare").checked ? 2 : 1);

function tell_budget({ slider, budget }) {
  const share = Math.round((100 * slider.value) / slider.max);
  const text = `${slider.value} of ${slider.max} (${share} %)`;
  $(".told", budget).textContent = text;
  slider.setAttribute("aria-valuetext", `${slider.value} of ${slider.max} tokens`);
}

// How many tokens the picture has decides how far the sliders go.
function set_full(full) {
  const { minimum = 1, maximum = full } = state.about.limits.tokens ?? {};
  for (const column of columns) {
    const { slider } = column;
    if (Number(slider.max) !== Math.min(full, maximum)) {
      const share = slider.value / slider.max;
      slider.max = Math.min(full, maximum);
      slider.min = Math.min(minimum, slider.max);
      slider.value = Math.round(share * slider.max);
    }
    tell_budget(column);
  }
}

function explain_soon(column) {
  clearTimeout(column.timer);
  column.timer = setTimeout(() => explain(column).catch(told), 150);
}

async function explain(column) {
  if (!state.picture || !state.about) return;
  column.explaining?.abort();
  column.explaining = new AbortController();
  const { panel, plan } = column;
  const asked = { image_url: state.picture.url, hiprune: plan, overlay: true };
  let found;
  try {
    found = await (await post("hiprune/explain", asked, column.explaining.signal)).json();
  } catch (error) {
    if (error.message.startsWith("404")) {
      $(".counts", panel).textContent = "This server does not explain its choices.";
      return;
    }
    throw error;
  }
  $("#error").textContent = "";
  const before = Number(column.slider.max);
  set_full(found.tokens_full);
  if (Number(column.slider.max) !== before) { for (const one of shown()) explain_soon(one); }
  for (const [role, count] of Object.entries(found.counts))
    $(`[data-role=${role}]`, panel).textContent = count;
  const { anchor, buffer, register } = found.counts;
  const text = `${found.tokens_kept} of ${found.tokens_full} visual tokens kept`;
  $(".counts", panel).textContent = text;
  const overlay = $(".overlay", panel);
  overlay.src = found.overlay;
  overlay.alt = `${text}: ${anchor} anchors, ${buffer} buffers, ${register} registers. ` +
    "Kept patches are bright, dropped ones dimmed.";
  overlay.hidden = false;
}

async function ask(column, signal) {
  const { panel, plan } = column;
  const answer = $(".answer", panel);
  answer.textContent = "";
  for (const name of ["kept", "prompt", "first"]) $(`.${name}`, panel).textContent = "…";
  const began = performance.now();
  let first = null;
  const asked = { ...body(state.model, $("#question").value, state.picture.url, plan), stream: true,
                  stream_options: { include_usage: true } };
  const response = await post("chat/completions", asked, signal);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const [image] = event.hiprune?.images ?? [];
    if (image) $(".kept", panel).textContent = `${image.tokens_kept} of ${image.tokens_full}`;
    const text = event.choices?.[0]?.delta?.content;
    if (text && first === null) {
      first = performance.now() - began;
      $(".first", panel).textContent = `${Math.round(first)} ms`;
    }
    if (text) answer.textContent = (answer.textContent + text).trimStart();
    if (event.usage) $(".prompt", panel).textContent = event.usage.prompt_tokens;
  }
}

async function ask_all(event) {
  event.preventDefault();
  if (!state.picture) return;
  $("#error").textContent = "";
  state.asking?.abort();
  const asking = new AbortController();
  state.asking = asking;
  $("#stop").disabled = false;
  try {
    // One after the other: side by side they would slow each other down.
    for (const column of shown()) await ask(column, asking.signal);
  } catch (error) {
    told(error);
  } finally {
    if (state.asking === asking) $("#stop").disabled = true;
  }
}

async function copy({ panel, plan }, button) {
  const { file = "picture.jpg", type = "image/jpeg" } = state.picture ?? {};
  const given = [state.model, $("#question").value, file, type, plan, $("#key").value !== ""];
  const text = button.dataset.as === "curl"
    ? asCurl(api("chat/completions"), ...given) : asPython(api("").replace(/\/$/, ""), ...given);
  try {
    await navigator.clipboard.writeText(text);
    $(".copied", panel).textContent = `Copied; it reads the picture from ${file}.`;
  } catch {
    $(".copied", panel).textContent = "The browser does not let this page write to the clipboard.";
  }
}

function set_picture(blob, file) {
  const reader = new FileReader();
  reader.onload = () => {
    state.picture = { url: reader.result, file, type: blob.type || "image/jpeg" };
    $("#picture").src = reader.result;
    $("#picture").alt = `The picture to ask about: ${file}`;
    $("#picture").hidden = false;
    $("#hint").textContent = file;
    $("#ask").disabled = !state.about?.supported;
    for (const column of shown()) explain_soon(column);
  };
  reader.readAsDataURL(blob);
}

function take_files(files) {
  const picture = [...(files ?? [])].find((one) => one.type.startsWith("image/"));
  if (picture) set_picture(picture, picture.name || "pasted.png");
  else $("#error").textContent = "That is no picture.";
}

async function show_samples() {
  const at = new URL("playground/samples/", document.baseURI);
  const found = await (await fetch(new URL("questions.json", at))).json();
  for (const [name, questions] of Object.entries(found)) {
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    image.src = new URL(name, at).href;
    image.alt = `Sample picture ${name}`;
    button.append(image);
    button.addEventListener("click", async () => {
      set_picture(await (await fetch(image.src)).blob(), name);
      show_questions(questions.map(([question]) => question));
    });
    $("#samples").append(button);
  }
}

function show_questions(questions) {
  $("#questions").replaceChildren(...questions.slice(0, 5).map((question) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = question;
    button.addEventListener("click", () => { $("#question").value = question; });
    return button;
  }));
}

async function show_server() {
  const response = await fetch(api("hiprune"), { headers: headers() });
  if (response.status === 401) {
    $("#with-key").open = true;
    $("#model").textContent = "This server wants an API key.";
    return;
  }
  if (!response.ok) throw new Error(await refusal(response));
  state.about = await response.json();
  state.model = state.about.model;
  $("#model").textContent = state.about.supported
    ? `${state.model}: ${state.about.family}, anchors from layer ${state.about.default.object_layer}` +
      ` of ${state.about.encoder.output_layer}`
    : `${state.model} cannot be pruned: ${state.about.reason}`;
  $("#ask").disabled = !(state.about.supported && state.picture);
  if (!state.about.supported) return;
  for (const column of columns) {
    const names = state.about.limits.method.enum;
    $(".method", column.budget).replaceChildren(...names.map((name) => new Option(name)));
  }
  for (const column of shown()) explain_soon(column);
}

function show_columns() {
  $("#panels").replaceChildren(...shown().map(({ panel }) => panel));
  for (const { budget } of columns) budget.remove();
  $("#budgets").append(...shown().map(({ budget }) => budget));
}

const drop = $("#drop");
for (const kind of ["dragenter", "dragover"])
  drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"])
  drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.remove("over"); });
drop.addEventListener("drop", (event) => take_files(event.dataTransfer.files));
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take_files(event.clipboardData.files);
});
$("#file").addEventListener("change", (event) => take_files(event.target.files));
$("#compare").addEventListener("change", () => { show_columns(); explain_soon(columns[1]); });
$("#form").addEventListener("submit", ask_all);
$("#stop").addEventListener("click", () => { state.asking?.abort(); $("#stop").disabled = true; });
$("#key").addEventListener("change", () => show_server().catch(told));

columns[1].slider.value = 16;
for (const column of columns) tell_budget(column);
show_columns();
show_server().catch(told);
show_samples().catch(told);
