"use strict";
const PAGE = JSON.parse(document.getElementById("data").textContent);
const KEYS = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", t: "tie", s: "skip", z: "undo", Backspace: "undo" };
// Control characters and bidirectional overrides, which would hide or turn around what stands beside them.
const HIDDEN = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff])/;
const STORE = "posttrain questions " + PAGE.digest;
const find = (id) => document.getElementById(id);

let annotator = null;
let answers = []; // one a question, in the order of the questions
let visible = 0; // milliseconds that the question was to be seen
let since = null;

function notice(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}

function keep(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch (error) {
    notice("This browser does not keep the answers (" + error.name + "): download them before you close the page.");
  }
}

function kept(key, fits) {
  try {
    const value = JSON.parse(localStorage.getItem(key));
    if (value === null || fits(value)) return value;
    notice("What this browser had kept for this page cannot be read, so it starts anew.");
  } catch (error) {
    notice("What this browser had kept for this page cannot be read (" + error.name + "), so it starts anew.");
  }
  return null;
}

const isWord = (value) => typeof value === "string" && value !== "";
const areAnswers = (value) => Array.isArray(value) && value.length <= PAGE.questions.length
  && value.every((one, place) => one && one.question === PAGE.questions[place].id && isWord(one.choice));

function show(element, text) {
  element.replaceChildren();
  if (text.trim() === "") {
    const nothing = document.createElement("span");
    nothing.className = "nothing";
    nothing.textContent = text === "" ? "empty" : "only white space";
    element.append(nothing);
    return;
  }
  text.replaceAll("\r\n", "\n").split(HIDDEN).forEach((part, place) => {
    if (place % 2 === 0) {
      element.append(part);
      return;
    }
    const mark = document.createElement("span");
    mark.className = "mark";
    mark.textContent = "U+" + part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    element.append(mark);
  });
}

function showPrompt(prompt) {
  const box = find("prompt");
  box.replaceChildren();
  for (const message of typeof prompt === "string" ? [{ content: prompt }] : prompt) {
    if (message.role !== undefined) {
      const role = document.createElement("div");
      role.className = "role";
      show(role, message.role);
      box.append(role);
    }
    const text = document.createElement("div");
    text.className = "text";
    text.dir = "auto";
    show(text, message.content);
    box.append(text);
  }
  box.scrollTop = 0;
}

function render() {
  const total = PAGE.questions.length, done = answers.length, started = annotator !== null;
  const question = started && done < total ? PAGE.questions[done] : null;
  find("start").hidden = started;
  find("who").hidden = !started;
  find("name").textContent = annotator ?? "";
  find("question").hidden = question === null;
  find("end").hidden = !started || question !== null;
  find("bar-of-buttons").hidden = !started;
  find("bar").max = total;
  find("bar").value = started ? done : 0;
  find("place").textContent = !started ? total + " questions"
    : question ? "Question " + (done + 1) + " of " + total : "All " + total + " questions done";
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = question === null;
  find("undo").disabled = done === 0;
  find("download").disabled = done === 0;
  find("download").textContent = "Download (" + done + ")";
  find("download").classList.toggle("next", question === null);
  if (question) {
    showPrompt(question.prompt);
    show(find("left"), question.left);
    show(find("right"), question.right);
  }
  scrollTo(0, 0);
  visible = 0;
  since = document.hidden ? null : performance.now();
}

function seconds() {
  return Math.round((visible + (since === null ? 0 : performance.now() - since)) / 100) / 10;
}

function act(action) {
  if (annotator === null) return;
  if (action === "undo") {
    if (answers.length === 0) return;
    answers = answers.slice(0, -1);
  } else {
    if (answers.length === PAGE.questions.length) return;
    const question = PAGE.questions[answers.length].id;
    answers = [...answers, { question, choice: action, seconds: seconds(), at: new Date().toISOString() }];
  }
  keep(STORE + " of " + annotator, answers);
  render();
}

function begin(name) {
  annotator = name;
  notice("");
  answers = kept(STORE + " of " + name, areAnswers) ?? [];
  keep(STORE, name);
  render();
}

function download() {
  const lines = answers.map(({ question, choice, seconds, at }) => JSON.stringify({ question, annotator, choice, seconds, at }) + "\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = "answers-" + PAGE.digest.slice(0, 8) + "-" + annotator.replace(/[^\p{L}\p{N}]+/gu, "-") + ".jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

find("start").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = find("annotator").value.normalize("NFC").replace(/\s+/g, " ").trim();
  if (name) begin(name);
});
find("change").addEventListener("click", () => {
  annotator = null;
  render();
  find("annotator").select();
});
for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => act(button.dataset.choice));
find("undo").addEventListener("click", () => act("undo"));
find("download").addEventListener("click", download);
document.addEventListener("keydown", (event) => {
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || annotator === null || event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  event.preventDefault();
  act(action);
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden && since !== null) visible += performance.now() - since;
  since = document.hidden ? null : performance.now();
});
// The same page in another tab.
addEventListener("storage", (event) => {
  if (annotator !== null && event.key === STORE + " of " + annotator) {
    answers = kept(event.key, areAnswers) ?? [];
    render();
  }
});

find("instruction").textContent = PAGE.instruction;
const last = kept(STORE, isWord);
if (last) begin(last);
else {
  render();
  find("annotator").focus();
}
